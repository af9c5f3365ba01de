"""What calibration on chats gives an instruct model: chats and prose, measured on the original and on conversions.

    python benchmarks/chat_calibration.py corpus 'train-*.jsonl.gz' gpteacher chats.jsonl --number 400
    mha2mla convert SmolLM2-135M-Instruct mixed --cache-ratio 0.3125 --data mixture.yaml
    python benchmarks/chat_calibration.py measure SmolLM2-135M-Instruct mixed --chats chats.jsonl \\
        --prose wikitext2_valid.jsonl:raw

`corpus` makes chats of a source that holds transcripts ("User: ... Assistant: ..."). `measure` gives perplexity of the
answers of the chats (template and questions are not predicted), the share of prompts whose answer ends by itself, and
perplexity of prose. The chats that are measured on must be of another source than those of the calibration.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import torch
from conversion_ablation import read_blocks
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import mha2mla.modeling  # noqa: F401  # registers the family
from mha2mla.common.perplexity import Perplexity
from mha2mla.evaluation import measure_perplexity

ROLES = {"User": "user", "Question": "user", "Assistant": "assistant", "Answer": "assistant"}
SPEAKER = re.compile(rf"^({'|'.join(ROLES)}): ", re.MULTILINE)

Chat = list[dict[str, str]]


def chat_of(transcript: str) -> Chat:
    """The messages of lines "User: ..." and "Assistant: ...", or "Question: ..." and "Answer: ..."."""
    _, *parts = SPEAKER.split(transcript)
    return [
        {"role": ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def alternates(chat: Chat) -> bool:
    """Whether user and assistant speak in turn, something is said each time, and the assistant has the last word."""
    roles = [message["role"] for message in chat]
    return bool(chat) and roles == ["user", "assistant"] * (len(chat) // 2) and all(m["content"] for m in chat)


def corpus_chats(pattern: str, source: str) -> Iterator[Chat]:
    for path in sorted(glob(pattern)):
        with gzip.open(path, "rt") as file:
            for line in file:
                document = json.loads(line)
                if document["source"] == source and alternates(chat := chat_of(document["text"])):
                    yield chat


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int, **sampling
) -> Iterator[tuple[str, bool]]:
    """What the model writes behind each prompt, and whether it ended by itself."""
    tokenizer.padding_side = "left"
    for begin in range(0, len(prompts), batch_size):
        inputs = tokenizer(
            prompts[begin : begin + batch_size], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        output = model.generate(**inputs.to(model.device), pad_token_id=tokenizer.pad_token_id, **sampling)
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in ids
            ids = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
            yield tokenizer.decode(ids).strip(), ended


def answer_spans(chat: Chat, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[int], torch.Tensor]:
    """
    The tokens of a chat, cut to `length`, and which of them are of answers, their end-of-sequence token included.

    Returns:
        Token ids, T of them, and a mask [T].
    """

    def render(messages: Chat, prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=prompt)[
            "input_ids"
        ]

    ids = render(chat, False)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            begin = len(render(chat[:i], True))
            mask[begin : ids.index(tokenizer.eos_token_id, begin) + 1] = True
    return ids[:length], mask[:length]


@torch.no_grad()
def answer_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[Chat], length: int
) -> Perplexity:
    """Of the answers' tokens, each chat on its own; the standard error is over chats."""
    sums, counts = [], []
    for chat in chats:
        ids, mask = answer_spans(chat, tokenizer, length)
        inputs = torch.tensor([ids], device=model.device)
        losses = nn.functional.cross_entropy(model(inputs).logits[0, :-1].float(), inputs[0, 1:], reduction="none")
        sums.append(losses[mask[1:].to(model.device)].double().sum().item())
        counts.append(int(mask[1:].sum()))
    return Perplexity.from_sums(sums, counts)


def share_ended(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[bool]:
    """Of greedy answers to the first questions of chats."""
    questions = [[chat[0]] for chat in read_chats(args.prompts or args.chats)[: args.number]]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in questions]
    sampling = dict(batch_size=args.batch_size, do_sample=False, max_new_tokens=args.answer_tokens)
    return [ended for _, ended in continue_prompts(model, tokenizer, prompts, **sampling)]


def read_chats(path: str) -> list[Chat]:
    return [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]


def save_chats(path: str, chats: list[Chat]) -> None:
    Path(path).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    print(f"{len(chats)} chats in {path}")


def load(folder: str, args: argparse.Namespace) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device).eval()


def measure(args: argparse.Namespace) -> None:
    print("| model | answers, perplexity | x | ended, % | prose, perplexity |\n|---|---|---|---|---|", flush=True)
    first = None
    for folder in args.models:
        model, tokenizer = load(folder, args), AutoTokenizer.from_pretrained(args.models[0])
        answers = answer_perplexity(model, tokenizer, read_chats(args.chats)[: args.number], args.length)
        prose = measure_perplexity(model, read_blocks(args.prose, tokenizer, args.blocks))
        ended = share_ended(model, tokenizer, args)
        first = first or answers.perplexity
        share, times = 100 * sum(ended) / len(ended), answers.perplexity / first
        print(f"| {Path(folder).name} | {answers} | {times:.2f} | {share:.1f} | {prose} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="Chats of a source of transcripts.")
    corpus.add_argument("files")
    corpus.add_argument("source")
    corpus.add_argument("output")
    table = commands.add_parser("measure", help="A table; the first model is the original.")
    table.add_argument("models", nargs="+")
    table.add_argument("--chats", required=True, help="A file that `corpus` wrote.")
    table.add_argument("--prompts", help="Another such file, of which the first questions are answered.")
    table.add_argument("--prose", required=True, metavar="FILE[:FIELD]")
    table.add_argument("--blocks", type=int, default=40, help="Of prose, 1,024 tokens each.")
    table.add_argument("--length", type=int, default=1024, help="Tokens of a chat that are read.")
    for command in (corpus, table):
        command.add_argument("--number", type=int, default=200, help="Chats, and prompts.")
    table.add_argument("--answer-tokens", type=int, default=256, help="Most that the model writes at a time.")
    table.add_argument("--batch-size", type=int, default=50)
    table.add_argument("--device", default="cpu")
    table.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    if args.command == "corpus":
        chats = corpus_chats(args.files, args.source)
        save_chats(args.output, [chat for _, chat in zip(range(args.number), chats, strict=False)])
    else:
        measure(args)


if __name__ == "__main__":
    main()
