"""Measure how fast the original and its conversion generate, and with how much cache.

    mha2mla bench ./my-llama my-llama-mla --batch-sizes 1,16 --contexts 1024,4096 --device cuda --dtype bfloat16
    mha2mla bench --random llama-2-7b --kv-lora-rank 2048 --caches dynamic,static-compiled --device cuda
    mha2mla bench --random smollm2-135m --kv-lora-rank 80 --qk-rope-head-dim 40 --contexts 256 --dtype float32

All models are measured in one run on one machine. Caches: dynamic, static, static-compiled (one CUDA graph a step),
and for converted models int8 and int4. The output folder gets speed.json, speed.md and speed.png.
"""

import gc
import json
import platform
import shlex
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from mha2mla.evaluation.report.pictures import encode_png
from mha2mla.evaluation.speed.speed import (
    CACHES,
    Speed,
    attention_bandwidth,
    copy_bandwidth,
    measure_speed,
    plot_speed,
    random_models,
    speed_table,
)
from mha2mla.modeling import MLALlamaConfig


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def load(folder: str, dtype: torch.dtype, device: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="mha2mla bench", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="The original, then its conversions: folders, or names on the Hub.")
    parser.add_argument("--random", help="Random weights of these dimensions instead of models.")
    parser.add_argument("--kv-lora-rank", type=int, default=512, help="Of the random converted model.")
    parser.add_argument("--qk-rope-head-dim", type=int, default=64)
    parser.add_argument("--num-rope-key-heads", type=int, default=1)
    parser.add_argument("--caches", default="dynamic", help=f"Some of {', '.join(CACHES)}, with commas.")
    parser.add_argument("--batch-sizes", type=numbers, default=[1], help="With commas.")
    parser.add_argument(
        "--contexts", type=numbers, default=[512], help="Tokens before the measured ones, with commas."
    )
    parser.add_argument("--steps", type=int, default=16, help="Decoding steps a repetition, of three.")
    parser.add_argument("--no-prefill", action="store_true", help="Fill caches with random numbers: no first token.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("speed-results"), help="Folder of the results.")
    args = parser.parse_args(argv)
    caches = args.caches.split(",")
    if unknown := [cache for cache in caches if cache not in CACHES]:
        raise ValueError(f"--caches may name {', '.join(CACHES)}, not {', '.join(unknown)}.")
    if bool(args.models) == bool(args.random):
        raise ValueError("Name models, or dimensions with --random, and not both.")
    dtype = getattr(torch, args.dtype)
    makers: dict[str, Callable[[], nn.Module]]
    if args.random:
        sizes = (args.kv_lora_rank, args.qk_rope_head_dim, args.num_rope_key_heads)
        makers = random_models(args.random, dtype, args.device, *sizes)
    else:
        makers = {Path(folder).name: partial(load, folder, dtype, args.device) for folder in args.models}

    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    measured: list[Speed] = []
    shares = []
    for name, make in makers.items():
        model = make()
        config = model.config
        latent = isinstance(config, MLALlamaConfig)
        for batch in args.batch_sizes:
            for context in args.contexts:
                for cache in caches:
                    if latent or not cache.startswith("int"):
                        measured.append(
                            measure_speed(model, name, cache, batch, context, args.steps, prefill=not args.no_prefill)
                        )
                if isinstance(config, MLALlamaConfig):
                    reached = attention_bandwidth(config, batch, context, dtype, device)
                    shares.append(dict(model=name, batch=batch, context=context, bytes_per_s=reached))
        del model  # the next one may need its memory
        gc.collect()

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    versions = f"{hardware}, torch {torch.__version__}, transformers {transformers.__version__}, {args.dtype}"
    table = speed_table(measured, f"Speed ({versions})").markdown()
    table += f"\n\nCopy bandwidth: {bandwidth / 1e9:,.1f} GB/s. Decoding attention over the cache reaches:\n"
    for share in shares:
        part = share["bytes_per_s"] / bandwidth
        table += f"- {share['model']}, batch {share['batch']}, context {share['context']}: {part:.1%} of it\n"
    print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    results = dict(
        command=shlex.join(["mha2mla", "bench", *argv]),
        versions=versions,
        copy_bytes_per_s=bandwidth,
        attention=shares,
        speed=[asdict(m) for m in measured],
    )
    (args.output / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "speed.md").write_text(table)
    (args.output / "speed.png").write_bytes(encode_png(plot_speed(measured)))
    print(f"Wrote {args.output}")
