"""Peak memory of a conversion for checkpoints of few and of many layers: it must not grow with the layers.

    python benchmarks/conversion_memory.py --layers 2 6                # Llama-2-70B's layers; needs 24 GB of disk
    python benchmarks/conversion_memory.py --layers 2 6 --scale 4      # a quarter of its width
    python benchmarks/conversion_memory.py --layers 2 6 --experts 8    # Mixtral 8x7B's, an expert a tensor

Makes a random checkpoint, converts it in a process of its own (preset calibrated), and prints that process's peak
resident memory and the seconds a layer took. Weights are random, so only memory and time mean anything.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

from mha2mla.conversion.checkpoint import CheckpointWriter


def make_checkpoint(folder: Path, num_layers: int, scale: int, experts: int, tokenizer: str) -> None:
    """A random bf16 checkpoint with Llama-2-70B's layer dimensions over `scale`, or Mixtral 8x7B's, written tensor by
    tensor."""
    sizes = dict(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        num_hidden_layers=num_layers,
        num_key_value_heads=max(1, 8 // scale),
        head_dim=128,
    )
    if experts:
        sizes |= dict(hidden_size=4096 // scale, intermediate_size=14336 // scale, num_attention_heads=32 // scale)
        config = MixtralConfig(**sizes, num_local_experts=experts)
    else:
        sizes |= dict(hidden_size=8192 // scale, intermediate_size=28672 // scale, num_attention_heads=64 // scale)
        config = LlamaConfig(**sizes)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    folder.mkdir()
    writer = CheckpointWriter(folder, 2 * 1024**3)
    for name, tensor in state.items():
        for part, shape in single_experts(name, tensor.shape) if ".experts." in name else [(name, tensor.shape)]:
            weight = torch.empty(shape, dtype=torch.bfloat16)
            writer.add(part, weight.fill_(1.0) if "norm" in part else weight.normal_(std=0.02))
    writer.finish()
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


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
    command = [sys.executable, "-m", "mha2mla.cli.main", "convert", str(source), str(output)]
    # The split is given, not searched: the search would carry several streams through layers that mean nothing.
    groups = max(1, 8 // args.scale)
    command += ["--qk-rope-head-dim", str(16 * groups), "--kv-lora-rank", str(64 * groups)]
    command += ["--data", args.data, "--device", args.device, "--score-samples", "2"]
    command += ["--samples", str(args.samples), "--refine-steps", str(args.refine_steps)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"The conversion failed: {' '.join(command)}")
    record = json.loads((output / "conversion.json").read_text())
    layers, gigabytes = len(record["layers"]), usage.ru_maxrss / 1024**2
    print(f"{layers} layers: peak resident memory {gigabytes:.2f} GiB, {record['seconds'] / layers:.1f} s a layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--scale", type=int, default=1, help="Divides the width of the layers.")
    parser.add_argument("--experts", type=int, default=0, help="Of a layer, each of Mixtral's size.")
    parser.add_argument("--tokenizer", required=True, help="Any tokenizer folder.")
    parser.add_argument("--data", required=True, help="Calibration text.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=8, help="Blocks of 512 tokens.")
    parser.add_argument("--refine-steps", type=int, default=2)
    args = parser.parse_args()
    for num_layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "source", Path(folder) / "output"
            make_checkpoint(source, num_layers, args.scale, args.experts, args.tokenizer)
            convert_and_report(source, output, args)


if __name__ == "__main__":
    main()
