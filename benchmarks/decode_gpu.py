"""Every GPU figure of docs/performance.md in one run: the decode kernel, a 7B step, the largest batch, the int4 cache.

    python benchmarks/decode_gpu.py                   # on one GPU; about ten minutes
    python benchmarks/decode_gpu.py --only kernel,step
    python benchmarks/decode_gpu.py --tiny            # tries the script on a CPU, in Triton's interpreter

Results go to $OUT/decode_gpu.json (or ./decode_gpu.json) after every case, so that a run that is cut off leaves what
it has. Every correctness check draws fresh inputs and compares with fp64.
"""

import argparse
import gc
import json
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import transformers

from mha2mla.evaluation.speed import (
    DIMENSIONS,
    allocated_nbytes,
    copy_bandwidth,
    fill,
    make_cache,
    measure_speed,
    numbers_per_token,
    random_models,
    time_calls,
)
from mha2mla.modeling import cache_nbytes, modeling_mla_llama
from mha2mla.modeling.decode_mla_llama import MAX_RANK, Part, Tiles, decode_attention, kernel_can_run
from mha2mla.modeling.quantization_mla_llama import dequantize, pack, quantize, unpack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = dict(
    batch=16, context=16384, step_batch=16, step_context=4096, steps=20, name="llama-2-7b", dtype=torch.bfloat16
)
TINY = dict(batch=2, context=200, step_batch=2, step_context=24, steps=2, name="pico", dtype=torch.float32)

# heads, R, rotary columns, bits, whether mask and length are given as the static cache does, microseconds wanted
KERNEL_CASES = [
    ("32 heads, R=512 + 64", 32, 512, 64, 16, False, 135),
    ("32 heads, R=512 + 64, mask and length", 32, 512, 64, 16, True, 135),
    ("32 heads, R=512 + 64, int4", 32, 512, 64, 4, False, 60),
    ("32 heads, R=512 + 64, int8", 32, 512, 64, 8, False, 90),
    ("9 heads, R=80 + 40", 9, 80, 40, 16, True, 40),
    ("32 heads, R=1024 + 64", 32, 1024, 64, 16, True, 270),
    ("32 heads, R=2048 + 32x16", 32, 2048, 512, 16, False, 600),
    ("32 heads, R=2048 + 32x16, mask and length", 32, 2048, 512, 16, True, 600),
]
# block_m, block_n, num_warps, num_stages: which are tried is decided here, not on the machine
SWEEP = [
    (32, 64, 8, 3),
    (32, 64, 8, 2),
    (32, 64, 4, 3),
    (32, 32, 8, 3),
    (32, 32, 4, 3),
    (64, 64, 4, 2),
    (16, 128, 4, 3),
    (16, 64, 8, 3),
    (16, 64, 8, 2),
    (16, 64, 4, 3),
    (16, 32, 8, 3),
    (16, 32, 4, 3),
]
TINY_SWEEP = [(16, 16, 4, 1)]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def make_part(
    batch: int, tokens: int, rank: int, rope: int, nbits: int, masked: bool, dtype
) -> tuple[Part, torch.Tensor]:
    """Random entries for the kernel, and the numbers they stand for (made a few tokens at a time)."""
    numbers = torch.randn(batch, tokens, rank + rope, device=DEVICE).to(dtype)
    if masked:
        mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=DEVICE)
        return Part(numbers, mask, torch.tensor([tokens], device=DEVICE)), numbers
    if nbits == 16:
        return Part(numbers), numbers
    codes, scales = [], []
    for piece in numbers.split(512, dim=1):
        made = [quantize(x, nbits, x.shape[-1]) for x in piece.split([rank, rope], -1)]
        codes.append(torch.cat([pack(c, nbits) for c, _ in made], -1))
        scales.append(torch.cat([s for _, s in made], -1))
        back = [dequantize(unpack(pack(c, nbits), nbits, c.shape[-1]), s, nbits, c.shape[-1]) for c, s in made]
        piece.copy_(torch.cat(back, -1))
    return Part(torch.cat(codes, 1), None, None, torch.cat(scales, 1), nbits, rank, rope), numbers


def tiles_to_try(rank: int, sweep) -> list[Tiles | None]:
    """The default, and the sweep's for the kernel that it is for."""
    return [None] if rank > MAX_RANK else [None, *(Tiles(m, n, w, s) for m, n, w, s in sweep)]


def compile_kernel(case: tuple, tiles: Tiles | None, dtype) -> None:
    """Run one variant once at a small size, in a process of its own: its binary is then in Triton's cache."""
    _, heads, rank, rope, nbits, masked, _ = case
    try:
        part, _ = make_part(1, 256, rank, rope, nbits, masked, dtype)
        decode_attention(torch.randn(1, heads, rank + rope, device=DEVICE).to(dtype), [part], rank, 1, 0.05, tiles)
    except Exception:  # reported where it is timed
        pass


def compile_kernels(sizes, sweep) -> None:
    jobs = [(case, tiles) for case in KERNEL_CASES for tiles in tiles_to_try(case[2], sweep)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(compile_kernel, case, tiles, sizes["dtype"]) for case, tiles in jobs]:
            job.result()


def kernel_case(name, heads, rank, rope, nbits, masked, target, sizes, sweep, bandwidth) -> dict:
    """Time of one layer's attention by the kernel, with its best tiles and its default ones, and by torch."""
    batch, tokens, dtype = sizes["batch"], sizes["context"], sizes["dtype"]
    part, numbers = make_part(batch, tokens, rank, rope, nbits, masked, dtype)
    query = torch.randn(batch, heads, rank + rope, device=DEVICE).to(dtype)
    scaling = 0.05
    expected = torch.cat(  # in fp64, one sequence at a time
        [
            (q.double() @ e.double().T * scaling).softmax(-1).unsqueeze(0) @ e[:, :rank].double()
            for q, e in zip(query, numbers, strict=True)
        ]
    )
    variants = []
    for tiles in tiles_to_try(rank, sweep):
        label = (
            "default" if tiles is None else f"{tiles.block_m}/{tiles.block_n}/{tiles.num_warps}w/{tiles.num_stages}s"
        )
        try:
            got = decode_attention(query, [part], rank, 1, scaling, tiles)
            seconds = time_calls(lambda t=tiles: decode_attention(query, [part], rank, 1, scaling, t), DEVICE, 0.2)
            variants.append(dict(tiles=label, us=seconds * 1e6, error=error(got, expected)))
        except Exception as problem:  # too much shared memory, say: the other tiles still tell something
            variants.append(dict(tiles=label, us=float("inf"), failed=str(problem)[:300]))

    def absorbed() -> torch.Tensor:
        return (query @ numbers.transpose(1, 2) * scaling).softmax(-1, dtype=torch.float32).to(dtype) @ numbers[
            ..., :rank
        ]

    best = min(variants, key=lambda v: v["us"])
    read = part.entries.numel() * part.entries.element_size() + (0 if part.scales is None else part.scales.numel())
    return dict(
        case=name,
        target_us=target,
        default=variants[0],
        best=best,
        variants=variants,
        torch_us=time_calls(absorbed, DEVICE, 0.2) * 1e6,
        floor_us=read / bandwidth * 1e6,
        share_of_copy_bandwidth=read / bandwidth / (best["us"] / 1e6),
    )


def check_shapes(count: int) -> dict:
    """The tests' property on this device: random shapes against fp64; the worst error for each dtype."""
    worst: dict[str, float] = {}
    generator = torch.Generator().manual_seed(int(time.time()))

    def draw(*choices):
        return choices[torch.randint(len(choices), (1,), generator=generator).item()]

    for _ in range(count):
        dtype = draw(torch.float16, torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else []))
        batch, heads, queries = draw(1, 3), draw(1, 9, 12, 32), draw(1, 1, 4)
        rank, rope, tokens = draw(16, 80, 100, 512, 700), draw(6, 40, 64, 200), draw(64, 333, 1500)
        entries = torch.randn(batch, tokens + 5, rank + rope, device=DEVICE).to(dtype)[:, :tokens]
        query = torch.randn(batch, heads * queries, rank + rope, device=DEVICE).to(dtype)
        starts = torch.randint(0, tokens - queries, (batch, 1, 1, 1), device=DEVICE)
        at = torch.arange(tokens, device=DEVICE)
        last = tokens - queries + torch.arange(queries, device=DEVICE)[:, None]
        mask = (at >= starts) & (at <= last)  # [B, 1, T, S]
        got = decode_attention(query, [Part(entries, mask)], rank, queries, 0.1)
        scores = query.double() @ entries.double().transpose(1, 2) * 0.1
        scores = scores.masked_fill(~mask.repeat(1, heads, 1, 1).flatten(1, 2), -torch.inf)
        name = str(dtype).removeprefix("torch.")
        worst[name] = max(worst.get(name, 0.0), error(got, scores.softmax(-1) @ entries[..., :rank].double()))
    return worst


def step_case(sizes) -> list[dict]:
    """One decoding step of stock and converted model, static cache and compiled; at 512 + 64 and at -68.75 %."""
    rows = []
    per_token = numbers_per_token(random_config(sizes["name"]))
    ranks = [(512, 64), (per_token * 5 // 16 - 128, 128)] if DEVICE.type == "cuda" else [(8, 4)]
    makers = {"stock": random_models(sizes["name"], sizes["dtype"], DEVICE.type, 8, 4, 1)["original"]}
    for rank, rope in ranks:
        makers[f"R={rank} + {rope}"] = random_models(sizes["name"], sizes["dtype"], DEVICE.type, rank, rope, 1)[
            "converted"
        ]
    for name, make in makers.items():
        model = make()
        for kind in ("dynamic", "static-compiled") if DEVICE.type == "cuda" else ("dynamic", "static"):
            torch._dynamo.reset()
            try:
                done = measure_speed(
                    model, name, kind, sizes["step_batch"], sizes["step_context"], sizes["steps"], prefill=False
                )
                rows.append(dict(model=name, cache=kind, ms=done.step_ms, tokens_per_s=done.tokens_per_s,
                                 peak_gb=(done.peak_bytes or 0) / 1e9, recompiles=recompiles()))  # fmt: skip
            except Exception as problem:
                rows.append(dict(model=name, cache=kind, failed=str(problem)[:300]))
        del model
        torch._dynamo.reset()
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def eager_case(sizes) -> list[dict]:
    """A dynamic cache without compilation, where launches count: with the kernel and with torch's attention."""
    rows = []
    name, ranks, shapes = "pico", (8, 4), [(1, 24)]
    if DEVICE.type == "cuda":
        name, ranks, shapes = "smollm2-135m", (80, 40), [(1, 1024), (1, 7000), (16, 2048)]
    model = random_models(name, sizes["dtype"], DEVICE.type, *ranks, 1)
    for which, kernel in (("original", False), ("converted", True), ("converted", False)):
        made = model[which]()
        with patch.object(modeling_mla_llama, "kernel_can_run", kernel_can_run if kernel else lambda *_: False):
            for batch, context in shapes:
                done = measure_speed(made, which, "dynamic", batch, context, sizes["steps"], prefill=False)
                rows.append(dict(model=which, kernel=kernel, batch=batch, context=context, ms=done.step_ms))
    return rows


def random_config(name: str):
    from transformers import LlamaConfig

    return LlamaConfig(**DIMENSIONS[name])


def recompiles() -> int:
    return sum(torch._dynamo.utils.counters["recompiles"].values())


def batch_case(sizes) -> list[dict]:
    """The largest batch at the context that memory holds, found by halving, and the tokens per second there."""
    context, rows = sizes["step_context"], []
    makers = random_models(
        sizes["name"], sizes["dtype"], DEVICE.type, *((512, 64) if DEVICE.type == "cuda" else (8, 4)), 1
    )
    for name, kinds in (("original", ["static"]), ("converted", ["static", "int4"])):
        model = makers[name]()
        for kind in kinds:
            torch._dynamo.reset()

            def fits(batch: int, kind=kind, model=model, name=name):
                try:
                    return measure_speed(model, name, kind, batch, context, 3, repetitions=1, prefill=False)
                except torch.cuda.OutOfMemoryError:
                    return None
                finally:
                    gc.collect()
                    if DEVICE.type == "cuda":
                        torch.cuda.empty_cache()

            if DEVICE.type == "cuda":
                total = torch.cuda.get_device_properties(DEVICE).total_memory
                left = 0.97 * total - torch.cuda.memory_allocated()
                sequence = numbers_per_token(model.config) * model.config.num_hidden_layers * 2 * context
                batch = int(left // (sequence * (0.27 if kind == "int4" else 1.0)))
            else:
                batch = 4
            done = None
            while batch > 0 and done is None:
                done = fits(batch)
                batch = batch if done else int(batch * 0.93)
            rows.append(dict(model=name, cache=kind, sequences=batch, tokens_per_s=done.tokens_per_s if done else 0.0,
                             ms=done.step_ms if done else float("inf")))  # fmt: skip
        del model, fits
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def bytes_case(sizes) -> dict:
    """Measured bytes of the int4 latent cache at -68.75 % over the original's in this dtype's width of 2 bytes."""
    config = random_config(sizes["name"])
    numbers = numbers_per_token(config)
    rope = 128 if DEVICE.type == "cuda" else 4
    make = random_models(sizes["name"], sizes["dtype"], DEVICE.type, numbers * 5 // 16 - rope, rope, 1)["converted"]
    model, context = make(), sizes["step_context"]
    cache = make_cache(model, "int4", context)
    fill(model, cache, 1, context)
    original = numbers * context * config.num_hidden_layers * 2
    return dict(context=context, nbytes=cache_nbytes(cache), share=cache_nbytes(cache) / original,
                allocated_share=allocated_nbytes(cache) / original)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="shapes,kernel,eager,step,bytes,batch")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    sizes, sweep = (TINY, TINY_SWEEP) if args.tiny else (FULL, SWEEP)
    path = Path(os.environ.get("OUT", ".")) / "decode_gpu.json"
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    bandwidth = copy_bandwidth(DEVICE)
    results: dict = dict(device=device, torch=torch.__version__, transformers=transformers.__version__, copy=bandwidth)
    print(
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"copy {bandwidth / 1e9:,.0f} GB/s"
    )

    def run(name: str, case) -> None:
        started = time.perf_counter()
        try:
            results[name] = case()
        except Exception:
            results[name] = traceback.format_exc()
        print(f"-- {name} [{time.perf_counter() - started:.0f} s]", flush=True)
        path.write_text(json.dumps(results, indent=1, default=str) + "\n")

    wanted = args.only.split(",")
    if "shapes" in wanted:
        run("shapes", lambda: check_shapes(2 if args.tiny else 60))
        print(results["shapes"])
    if "kernel" in wanted:
        if not args.tiny:
            run("compile", lambda: compile_kernels(sizes, sweep))
        for case in KERNEL_CASES[:: 4 if args.tiny else 1]:
            if args.tiny:
                case = (case[0], 9, 16, 8, *case[4:])
            run(case[0], lambda case=case: kernel_case(*case, sizes, sweep, bandwidth))
            row = results[case[0]]
            if isinstance(row, dict):
                print(
                    f"{row['case']}: target {row['target_us']}, floor {row['floor_us']:.0f}, default "
                    f"{row['default']['us']:.0f} (error {row['default'].get('error', float('nan')):.1e}), best "
                    f"{row['best']['us']:.0f} us with {row['best']['tiles']}, "
                    f"{row['share_of_copy_bandwidth']:.0%} of copy; "
                    f"torch {row['torch_us']:.0f}"
                )
            else:
                print(row[-600:])
    for name, case in (("eager", eager_case), ("step", step_case), ("bytes", bytes_case), ("batch", batch_case)):
        if name in wanted:
            run(name, lambda case=case: case(sizes))
            rows = results[name]
            for row in rows if isinstance(rows, list) else [rows]:
                print(
                    row[-600:]
                    if isinstance(row, str)
                    else {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                )
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
