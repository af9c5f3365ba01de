"""Recovery at size: tokens a second, memory and FLOP utilisation of a model with its teacher, sharded by FSDP2.

    python benchmarks/recovery_fsdp.py SmolLM2-135M-Instruct train.jsonl.gz -- --per_device_train_batch_size 4

Tried on a CPU, where the share of the peak means nothing:

    python benchmarks/recovery_fsdp.py SmolLM2-135M-Instruct train.jsonl --processes 0 --model smollm2-135m \\
        --rank 80 --rope 40 --length 64 --steps 8 -- --use_cpu

The weights are drawn at random, the tokenizer and the text are any; what stands behind `--` are arguments of `mha2mla
train`. FLOPs are those of the model's matrices, 6 a weight and token for the student and 2 for the teacher, and of
causal attention over the length of a row; what gradient checkpointing computes again does not count. The rate is the
median step's: compilation and waiting for text are left out.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoTokenizer

import mha2mla.modeling  # noqa: F401  # registers the family
from mha2mla.evaluation.speed.dimensions import DIMENSIONS, random_models

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 (SXM), as its vendor has it
CONFIG = Path(__file__).parents[1] / "docs/examples/accelerate/fsdp2.yaml"


def write_models(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Random checkpoints `original` and `converted`; gives the weights of their matrices, without the embedding's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {}
    for name, make in random_models(args.model, torch.bfloat16, device, args.rank, args.rope, 1).items():
        model = make()
        embedding = model.get_input_embeddings().weight.numel()
        sizes[name] = sum(held.numel() for held in model.parameters() if held.dim() == 2) - embedding
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(folder / name)
    return sizes


def attention_flops(folder: Path, length: int) -> float:
    """Of scores and their sum over values in a forward pass, a token of a row; half of a row lies behind a token."""
    config = AutoConfig.from_pretrained(folder)
    widths = 2 * config.head_dim  # computed head by head in training, as the original's are
    if hasattr(config, "qk_rope_head_dim"):
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 2 * config.num_hidden_layers * config.num_attention_heads * widths * length / 2


def watch_memory(peaks: dict[int, int], done: threading.Event) -> None:
    """The most memory that each GPU had in use, MiB, seen every half second."""
    while not done.wait(0.5):
        query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines():
            gpu, used = map(int, line.split(","))
            peaks[gpu] = max(peaks.get(gpu, 0), used)


def run_training(folder: Path, args: argparse.Namespace) -> list[dict]:
    """The lines of the log; the run is ended with its last one, without the checkpoint."""
    launch = [sys.executable, "-m"]
    if args.processes:
        launch += ["accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", str(args.processes)]
        launch += ["-m"]
    models = ["--model", str(folder / "converted"), "--teacher", str(folder / "original"), "--data", args.data]
    common = ["--output", str(folder / "recovered"), "--max_steps", str(args.steps), "--logging_steps", "1"]
    common += ["--save_strategy", "no", "--length", str(args.length), "--streaming", "true", "--report_to", "none"]
    command = [*launch, "mha2mla.cli.main", "train", *models, *common, *args.arguments]
    lines: list[dict] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"\{'loss'.*\}", line):
                lines.append({name: float(value) for name, value in ast.literal_eval(found[0]).items()})
                if len(lines) == args.steps:
                    process.terminate()
    return lines


def median_rate(lines: list[dict]) -> float:
    """Tokens a second of the median step; the first is not among them."""
    steps = [
        (line["num_input_tokens_seen"] - before["num_input_tokens_seen"])
        / (line["train_runtime"] - before["train_runtime"])
        for before, line in pairwise(lines)
    ]
    return median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="Any tokenizer folder.")
    parser.add_argument("data", help="Any text.")
    parser.add_argument("--model", choices=DIMENSIONS, default="llama-3-8b")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rope", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="GPUs; 0 runs without accelerate.")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    args.arguments = sys.argv[split + 1 :]
    with TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        sizes = write_models(folder, args)
        flops = 6 * sizes["converted"] + 3 * attention_flops(folder / "converted", args.length)
        flops += 2 * sizes["original"] + attention_flops(folder / "original", args.length)
        peaks: dict[int, int] = {}
        done = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            threading.Thread(target=watch_memory, args=(peaks, done), daemon=True).start()
        lines = run_training(folder, args)
        done.set()
    if len(lines) < args.steps:
        raise SystemExit("The training ended early; its output is above.")
    rate = median_rate(lines)
    used = flops * rate / (PEAK_FLOPS * max(1, args.processes))
    print(
        f"{args.model}, {args.processes} GPUs, rows of {args.length}: {rate:,.0f} tokens a second, "
        f"{flops / 1e9:.1f} GFLOP a token, {used:.1%} of the peak; memory in MiB {peaks}"
    )


if __name__ == "__main__":
    main()
