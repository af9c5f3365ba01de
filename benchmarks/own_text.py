"""Text that the original writes itself, to train its conversion on: how-to in everyday English, and chats.

    python benchmarks/own_text.py SmolLM2-135M-Instruct own.jsonl --tokens 5e6       # vLLM, on a GPU

How-to is what the corpus of recovery lacks (docs/dev/training.md, "Why HellaSwag loses most"). Every text begins
with one of a few openings that any page of advice might have, and goes on as the model samples it; no item of any
evaluation set is looked at. In the chats the model writes both sides, as `chat_calibration.py write` does. What
does not end by itself is kept, cut off. Lines are {"text": ...}, with the markers of the template as they are.
"""

import argparse
import json
import math
import os
import random
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

from chat_calibration import user_head
from transformers import AutoTokenizer

OPENINGS = (
    "How to",
    "How do I",
    "How do you",
    "How can I",
    "What should I do when",
    "What is the best way to",
    "The easiest way to",
    "Steps to",
    "Tips for",
    "Why do",
    "You will need:",
    "To",
)
LENGTH = 320  # tokens of a text, and of each side of a chat, at most
ROUND = 5e5  # tokens, roughly, that are written out at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=float, default=5e6, help="To be written, roughly.")
    parser.add_argument("--chats", type=float, default=0.3, help="Share of the tokens.")
    parser.add_argument("--start", default="<|endoftext|>", help="What stands in front of a document.")
    parser.add_argument("--temperature", type=float, default=0.8, help="Of how-to and answers; questions have 1.")
    parser.add_argument(
        "--memory", type=float, default=12.0, help="Of the cache, in GiB; other work may share the GPU."
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    llm = LLM(
        model=args.model,
        dtype="bfloat16",
        seed=args.seed,
        max_model_len=3 * LENGTH,
        max_num_seqs=1024,
        gpu_memory_utilization=0.05,  # what has to be free at the start; the next line decides
        kv_cache_memory_bytes=int(args.memory * 2**30),
    )

    def write(prompts: list[tuple[str, float]]) -> list[tuple[str, bool]]:
        """What the model writes after texts at their temperatures, and whether it ended by itself."""
        ids = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text, _ in prompts]
        sampling = [SamplingParams(temperature=heat, top_p=0.95, max_tokens=LENGTH) for _, heat in prompts]
        outputs = [output.outputs[0] for output in llm.generate(ids, sampling, use_tqdm=False)]
        return [(output.text, output.finish_reason == "stop") for output in outputs]

    def whole_chat(chat: list[dict], prompt: str, text: str, ended: bool) -> str:
        answer = {"role": "assistant", "content": text.strip()}
        return tokenizer.apply_chat_template([*chat, answer], tokenize=False) if ended else prompt + text.strip()

    # A round writes how-to, questions, and answers to the questions of the last one: few wait for the longest. A run
    # that is stopped keeps its rounds.
    draw, chats = random.Random(args.seed), list[list[dict]]()
    rounds = math.ceil(args.tokens / ROUND)
    with args.output.open("w") as file:
        for number in range(rounds + 1):
            texts_wanted = max(0.0, min(ROUND, args.tokens - number * ROUND)) / (0.8 * LENGTH)
            openings = [draw.choice(OPENINGS) for _ in range(round(texts_wanted * (1 - args.chats)))]
            heads = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
            asked = [(args.start + opening, args.temperature) for opening in openings]
            asked += [(head, args.temperature) for head in heads]
            asked += [(user_head(tokenizer), 1.0)] * round(texts_wanted * args.chats)
            made = iter(write(asked) if asked else [])
            texts = [opening + next(made)[0] for opening in openings]
            texts += [whole_chat(chat, head, *next(made)) for chat, head in zip(chats, heads, strict=True)]
            said = [text.strip() for text, ended in made if ended]
            chats = [[{"role": "user", "content": text}] for text in said if text]
            draw.shuffle(texts)
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            file.flush()
            print(f"round {number} of {rounds}: {len(texts):,} texts", flush=True)


if __name__ == "__main__":
    main()
