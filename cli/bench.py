"""Measure how fast the original and its conversion generate, and with how much cache.

    mha2mla bench ./my-llama my-llama-mla --batch-sizes 1,16 --contexts 1024,4096 --device cuda --dtype bfloat16
    mha2mla bench --random llama-2-7b --kv-lora-rank 2048 --caches dynamic,static-compiled --device cuda
    mha2mla bench --random smollm2-135m --kv-lora-rank 80 --qk-rope-head-dim 40 --contexts 256 --dtype float32

All models are measured in one run on one machine. Caches are those of `mha2mla eval`, and two more: static, and
static-compiled (one CUDA graph a step). The output folder gets speed.json, speed.md and speed.png.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .parsing import Names, Positionals, Sizes, parse

POSITIONALS: Positionals = {
    "models": dict(nargs="*", help="The original, then its conversions: folders, or names on the Hub.")
}


@dataclass
class BenchArguments:
    """What is measured, and where the results go."""

    random: str | None = field(
        default=None, metadata={"help": "Random weights of these dimensions instead of models: llama-2-7b, ..."}
    )
    kv_lora_rank: int = field(default=512, metadata={"help": "Of the random converted model."})
    qk_rope_head_dim: int = field(default=64, metadata={"help": "Of the random converted model."})
    num_rope_key_heads: int = field(default=1, metadata={"help": "Of the random converted model."})
    caches: Names = field(
        default=Names("dynamic"),
        metadata={
            "help": "With commas: dynamic, static, static-compiled, int8, int4, int2, fp8; the ints also with a "
            "backend before them (latent-, quanto-, hqq-), a converted model's also static (static-compiled-int4)."
        },
    )
    batch_sizes: Sizes = field(default=Sizes("1"), metadata={"help": "With commas."})
    contexts: Sizes = field(default=Sizes("512"), metadata={"help": "Tokens before the measured ones, with commas."})
    steps: int = field(default=16, metadata={"help": "Decoding steps a repetition, of three."})
    no_prefill: bool = field(
        default=False, metadata={"help": "Fill caches with random values instead of a prompt: no first token."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of weights and cache."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    output: Path = field(default=Path("speed-results"), metadata={"help": "Folder of the results."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that models bring along."})

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")


def main(argv: list[str]) -> None:
    options, given = parse(argv, "mha2mla bench", BenchArguments, description=__doc__, positionals=POSITIONALS)
    if bool(given.models) == bool(options.random):
        raise ValueError("Name models, or dimensions with --random, and not both.")

    from functools import partial

    import torch

    from mha2mla.common.device import check_device
    from mha2mla.common.loading import check_router, distinct_names, load_config, load_model, plain_path
    from mha2mla.evaluation.caches import VLLM_NAME, CacheKind, check_suited
    from mha2mla.evaluation.speed.dimensions import random_models
    from mha2mla.evaluation.speed.run import bench_models

    device = check_device(options.device)
    dtype = getattr(torch, options.dtype)
    caches = [CacheKind.parse(name) for name in dict.fromkeys(options.caches)]
    if VLLM_NAME in options.caches:
        raise ValueError(
            f"--caches {VLLM_NAME}: it tells what vLLM's cache costs in quality, which `mha2mla eval` measures. How "
            "fast vLLM is, only vLLM tells."
        )

    def load(path: str):
        return load_model(path, trust_remote_code=options.trust_remote_code, dtype=dtype).to(device).eval()

    if options.random:
        sizes = (options.kv_lora_rank, options.qk_rope_head_dim, options.num_rope_key_heads)
        makers = random_models(options.random, dtype, options.device, *sizes)
    else:
        makers = {name: partial(load, path) for path, name in distinct_names(map(plain_path, given.models)).items()}
        configs = {path: load_config(path, trust_remote_code=options.trust_remote_code) for path in given.models}
        for path, config in configs.items():  # before the first is measured
            check_router(config, path, "model")
        check_suited(caches, configs.values())
    table = bench_models(
        makers,
        options.output,
        shlex.join(["mha2mla", "bench", *argv]),
        caches,
        options.batch_sizes,
        options.contexts,
        options.steps,
        not options.no_prefill,
        options.dtype,
        options.device,
    )
    print(table)
    print(f"Wrote {options.output}")
