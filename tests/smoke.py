"""Converts a pico model and has it write, with what the wheel brings and nothing else: `make release`."""

import subprocess
import sys
import tempfile
from pathlib import Path

from pico import BLOCK_PACKAGE, byte_pair_tokenizer, make_source

GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
out = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=4, min_new_tokens=4)
print(type(model).__name__, "wrote", out.shape[1], "tokens")
"""


def run(*command: str | Path) -> None:
    print("$", *command[:2], flush=True)
    subprocess.run(list(map(str, command)), check=True)


with tempfile.TemporaryDirectory() as name:
    work = Path(name)
    source, text, converted = work / "source", work / "text.txt", work / "converted"
    tokenizer = byte_pair_tokenizer()
    model = make_source()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    run("mha2mla", "--version")
    run("mha2mla", "plan", source)
    sizes = ("--cache-ratio", "0.5", "--samples", "4", "--length", "16", "--refine-steps", "2")
    run("mha2mla", "convert", source, converted, "--data", text, *sizes)
    run("mha2mla", "export", converted, work / "exported")
    run(sys.executable, "-c", BLOCK_PACKAGE + GENERATE, converted)
