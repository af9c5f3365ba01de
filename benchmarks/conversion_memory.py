"""Time and peak memory of a conversion at size, on random weights.

    python benchmarks/conversion_memory.py --model llama-3-8b --layers 32 --device cuda --defaults   # 32 GB of disk
    python benchmarks/conversion_memory.py --model llama-2-70b --layers 2 6     # memory must not grow with the layers
    python benchmarks/conversion_memory.py --model llama-2-70b --layers 2 6 --scale 4   # a quarter of its width
    python benchmarks/conversion_memory.py --model mixtral-8x7b --layers 2 6            # an expert a tensor

Makes a random checkpoint, converts it in a process of its own (preset calibrated), and prints that process's peak
memory and the seconds a layer took. With `--defaults` text, steps and the search for the split are those that are
shipped, for the cache that `--serve vllm` takes. Weights are random, so only memory and time mean anything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mha2mla.conversion.checkpoint import CheckpointWriter
from mha2mla.evaluation.speed.dimensions import DIMENSIONS

MODELS = ("llama-2-70b", "llama-3-8b", "mixtral-8x7b")
SCALED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# What the process that converts prints at its end, bytes.
PEAK = "import torch; print('peak', torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0)"


def make_checkpoint(folder: Path, args: argparse.Namespace, num_layers: int) -> None:
    """A random bf16 checkpoint with the layers of a known model, its width over `scale`, written tensor by tensor."""
    sizes = DIMENSIONS[args.model] | dict(
        vocab_size=len(AutoTokenizer.from_pretrained(args.tokenizer)), num_hidden_layers=num_layers
    )
    config = AutoConfig.for_model(**sizes | {name: max(1, sizes[name] // args.scale) for name in SCALED})
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    folder.mkdir()
    writer = CheckpointWriter(folder, 2 * 1024**3)
    for name, tensor in state.items():
        for part, shape in single_experts(name, tensor.shape) if ".experts." in name else [(name, tensor.shape)]:
            weight = torch.empty(shape, dtype=torch.bfloat16, device=args.device)
            writer.add(part, (weight.fill_(1.0) if "norm" in part else weight.normal_(std=0.02)).cpu())
    writer.finish()
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(folder)


def single_experts(name: str, shape: torch.Size) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and shape of each expert's matrices in a file, of a tensor that holds those of a layer in memory."""
    prefix, kind = name.replace(".mlp.", ".block_sparse_moe.").rsplit(".", 1)
    count, rows, columns = shape
    parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    for index in range(count):
        for part in parts:
            yield f"{prefix}.{index}.{part}.weight", (rows // len(parts), columns)


def convert_and_report(source: Path, output: Path, args: argparse.Namespace) -> None:
    """Convert in a process of its own, and print its peak memory."""
    options = ["convert", str(source), str(output), "--data", args.data, "--device", args.device]
    if args.defaults:
        options += ["--serve", "vllm"]
    else:
        groups = max(1, DIMENSIONS[args.model]["num_key_value_heads"] // args.scale)
        options += ["--qk-rope-head-dim", str(16 * groups), "--kv-lora-rank", str(64 * groups), "--score-samples", "2"]
        options += ["--samples", str(args.samples), "--length", "512", "--refine-steps", str(args.refine_steps)]
    program = f"from mha2mla.cli.main import main; status = main({options!r}); {PEAK}; raise SystemExit(status)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"The conversion failed: {' '.join(options)}")
    record = json.loads((output / "conversion.json").read_text())
    layers, gigabytes = len(record["layers"]), usage.ru_maxrss / 1024**2
    on_device = int(printed.split("peak ")[-1]) / 1024**3
    print(
        f"{args.model}, {layers} layers: {record['seconds']:.0f} s, {record['seconds'] / layers:.1f} s a layer; peak "
        f"resident memory {gigabytes:.2f} GiB, on the device {on_device:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-2-70b", help="Whose layers.")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--scale", type=int, default=1, help="Divides the width of the layers.")
    parser.add_argument("--tokenizer", required=True, help="Any tokenizer folder.")
    parser.add_argument("--data", required=True, help="Calibration text.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--defaults", action="store_true", help="The shipped settings; ignores those that follow.")
    parser.add_argument("--samples", type=int, default=8, help="Blocks of 512 tokens.")
    parser.add_argument("--refine-steps", type=int, default=2)
    args = parser.parse_args()
    for num_layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "source", Path(folder) / "output"
            make_checkpoint(source, args, num_layers)
            convert_and_report(source, output, args)


if __name__ == "__main__":
    main()
