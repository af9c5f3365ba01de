"""Text that the original writes itself, to train its conversion on: how-to in everyday English, and chats.

    python benchmarks/own_text.py SmolLM2-135M-Instruct own.jsonl --tokens 5e6       # vLLM, on a GPU

How-to is what the corpus of recovery lacks (docs/dev/training.md, "Why HellaSwag loses most"). Every text begins
with one of a few openings that any page of advice might have, and goes on as the model samples it; no item of any
evaluation set is looked at. In the chats the model writes both sides, as `chat_calibration.py write` does. What
does not end by itself is kept, cut off. Lines are {"text": ...}, with the markers of the template as they are.
"""

import argparse
import json
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

    def write(prompts: list[str], temperature: float) -> list[tuple[str, bool]]:
        """What the model writes, and whether it ended by itself."""
        ids = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in prompts]
        sampling = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=LENGTH)
        outputs = [output.outputs[0] for output in llm.generate(ids, sampling, use_tqdm=False)]
        return [(output.text, output.finish_reason == "stop") for output in outputs]

    def write_round(draw: random.Random, tokens: float) -> list[str]:
        """How-to and chats of roughly so many tokens."""
        openings = [draw.choice(OPENINGS) for _ in range(round(tokens * (1 - args.chats) / (0.8 * LENGTH)))]
        written = write([args.start + opening for opening in openings], args.temperature)
        texts = [opening + text for opening, (text, _) in zip(openings, written, strict=True)]

        count = round(tokens * args.chats / (0.8 * LENGTH))
        said = [text.strip() for text, ended in write([user_head(tokenizer)] * count, 1.0) if ended]
        chats = [[{"role": "user", "content": text}] for text in said if text]
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        for chat, prompt, (text, ended) in zip(chats, prompts, write(prompts, args.temperature), strict=True):
            answer = {"role": "assistant", "content": text.strip()}
            whole = tokenizer.apply_chat_template([*chat, answer], tokenize=False)
            texts.append(whole if ended else prompt + text.strip())
        draw.shuffle(texts)
        return texts

    draw, number = random.Random(args.seed), 0
    with args.output.open("w") as file:
        while number * ROUND < args.tokens:  # a run that is stopped keeps its rounds
            for text in write_round(draw, min(ROUND, args.tokens - number * ROUND)):
                file.write(json.dumps({"text": text}) + "\n")
            file.flush()
            number += 1
            print(f"{min(number * ROUND, args.tokens):,.0f} tokens in {args.output}", flush=True)


if __name__ == "__main__":
    main()
