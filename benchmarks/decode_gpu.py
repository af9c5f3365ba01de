"""The GPU figures of docs/dev/performance.md in one run: decode kernel, steps of 7B and 8B, largest batch, int4 cache.

    python benchmarks/decode_gpu.py                   # on one GPU; about ten minutes
    python benchmarks/decode_gpu.py --only kernel,step
    python benchmarks/decode_gpu.py --tiny            # tries the script on a CPU, in Triton's interpreter

Results go to $OUT/decode_gpu.json (or ./decode_gpu.json) after every row, so that a run that is cut off leaves what
it has. Every correctness check draws fresh inputs and compares with fp64.
"""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from decode_gpu_kernel import DEVICE, KERNEL_CASES, SWEEP, TINY_SWEEP, check_shapes, compile_kernels, kernel_case

from mha2mla.evaluation.caches import DYNAMIC, CacheKind
from mha2mla.evaluation.speed.bandwidth import copy_bandwidth
from mha2mla.evaluation.speed.dimensions import DIMENSIONS, random_models
from mha2mla.evaluation.speed.measure import allocated_nbytes, fill, measure_speed, numbers_per_token
from mha2mla.modeling import cache_nbytes, latent_module
from mha2mla.modeling.latent_decode import kernel_can_run

FULL = dict(
    batch=16, context=16384, step_batch=16, step_context=4096, steps=20, name="llama-2-7b", dtype=torch.bfloat16
)
TINY = dict(batch=2, context=200, step_batch=2, step_context=24, steps=2, name="pico", dtype=torch.float32)


def step_case(sizes, wide: bool) -> Iterator[dict]:
    """One decoding step, static cache and compiled, of the stock model and at 512 + 64, or at -68.75 %."""
    per_token = numbers_per_token(random_config(sizes["name"]))
    rank, rope = (per_token * 5 // 16 - 128, 128) if wide else (512, 64)
    if DEVICE.type != "cuda":
        rank, rope = 8, 4
    made = random_models(sizes["name"], sizes["dtype"], DEVICE.type, rank, rope, 1)
    makers = {f"R={rank} + {rope}": made["converted"]}
    if not wide:
        makers["stock"] = made["original"]
    for name, make in makers.items():
        model = make()
        for kind in ("dynamic", "static-compiled") if DEVICE.type == "cuda" else ("dynamic", "static"):
            torch._dynamo.reset()
            try:
                cache, shape = CacheKind.parse(kind), (sizes["step_batch"], sizes["step_context"])
                done = measure_speed(model, name, cache, *shape, sizes["steps"], prefill=False)
                row = dict(ms=done.step_ms, tokens_per_s=done.tokens_per_s, peak_gb=(done.peak_bytes or 0) / 1e9)
                yield dict(model=name, cache=kind, **row, recompiles=recompiles())
            except Exception as problem:
                yield dict(model=name, cache=kind, failed=str(problem)[:300])
        del model
        release()


def llama3_case(sizes, form: str | None) -> Iterator[dict]:
    """One compiled decoding step of Llama-3-8B's dimensions at 512 + 64, in full precision or as codes."""
    name, ranks, shapes = "pico", (8, 4), [(2, 24)]
    if DEVICE.type == "cuda":
        name, ranks, shapes = "llama-3-8b", (512, 64), [(16, sizes["step_context"]), (64, sizes["step_context"])]
    model = random_models(name, sizes["dtype"], DEVICE.type, *ranks, 1)["converted"]()
    weights = sum(held.numel() * held.element_size() for held in model.parameters())
    kind = "static-compiled" if DEVICE.type == "cuda" else "static"
    kind += f"-{form}" if form else ""
    for batch, context in shapes:
        torch._dynamo.utils.counters.clear()
        shown = dict(model=name, cache=kind, batch=batch, context=context)
        try:
            cache = CacheKind.parse(kind)
            done = measure_speed(model, name, cache, batch, context, sizes["steps"], prefill=False)
            read = (weights + done.cache_bytes) / 1e9
            yield shown | dict(ms=done.step_ms, gigabytes=read, recompiles=recompiles())
        except Exception as problem:
            yield shown | dict(failed=str(problem)[:300])
        release()


def release() -> None:
    torch._dynamo.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def eager_case(sizes) -> Iterator[dict]:
    """A dynamic cache without compilation, where launches count: with the kernel and with torch's attention."""
    cases = [("pico", (8, 4), [(1, 24)])]
    if DEVICE.type == "cuda":
        cases = [
            ("llama-3-8b", (512, 64), [(1, 4096)]),
            ("smollm2-135m", (80, 40), [(1, 1024), (1, 7000), (16, 2048)]),
        ]
    for name, ranks, shapes in cases:
        model = random_models(name, sizes["dtype"], DEVICE.type, *ranks, 1)
        for which, kernel in (("original", False), ("converted", True), ("converted", False)):
            made = model[which]()
            with patch.object(latent_module, "kernel_can_run", kernel_can_run if kernel else lambda *_: False):
                for batch, context in shapes:
                    done = measure_speed(made, which, DYNAMIC, batch, context, sizes["steps"], prefill=False)
                    shown = dict(dimensions=name, model=which, kernel=kernel, batch=batch, context=context)
                    yield shown | dict(ms=done.step_ms)
            del made
            release()


def random_config(name: str):
    from transformers import LlamaConfig

    return LlamaConfig(**DIMENSIONS[name])


def recompiles() -> int:
    return sum(torch._dynamo.utils.counters["recompiles"].values())


def batch_case(sizes) -> Iterator[dict]:
    """The largest batch at the context that memory holds, found by trying fewer and fewer, and its speed."""
    context = sizes["step_context"]
    makers = random_models(
        sizes["name"], sizes["dtype"], DEVICE.type, *((512, 64) if DEVICE.type == "cuda" else (8, 4)), 1
    )
    # Uncompiled: a step of so many sequences is longer than its launches, and a compilation a minute.
    for name, kinds in (("converted", ["static-int4", "static"]), ("original", ["static"])):
        model = makers[name]()
        for kind in kinds:
            torch._dynamo.reset()

            def fits(batch: int, kind=kind, model=model, name=name):
                try:
                    cache = CacheKind.parse(kind)
                    return measure_speed(model, name, cache, batch, context, 3, repetitions=1, prefill=False)
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
                # Of codes a quarter of the bytes, scales, the ring; and room for a step's activations.
                batch = int(left // (sequence * (0.3 if kind.endswith("int4") else 1.0)))
            else:
                batch = 4
            done = None
            while batch > 0 and done is None:
                done = fits(batch)
                batch = batch if done else int(batch * 0.93)
            speed = dict(tokens_per_s=done.tokens_per_s, ms=done.step_ms) if done else dict(tokens_per_s=0.0)
            yield dict(model=name, cache=kind, sequences=batch, **speed)
        del model, fits
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def bytes_case(sizes) -> Iterator[dict]:
    """Measured bytes of the int4 latent cache at -68.75 % over the original's in this dtype's width of 2 bytes."""
    config = random_config(sizes["name"])
    numbers = numbers_per_token(config)
    rope = 128 if DEVICE.type == "cuda" else 4
    make = random_models(sizes["name"], sizes["dtype"], DEVICE.type, numbers * 5 // 16 - rope, rope, 1)["converted"]
    model, context = make(), sizes["step_context"]
    cache = CacheKind.parse("int4").make(model)
    fill(model, cache, 1, context)
    original = numbers * context * config.num_hidden_layers * 2
    shares = dict(share=cache_nbytes(cache) / original, allocated_share=allocated_nbytes(cache) / original)
    yield dict(context=context, nbytes=cache_nbytes(cache), **shares)


CASES: dict[str, Callable[[dict], Iterator[dict]]] = {
    "eager": eager_case,
    "step": partial(step_case, wide=False),
    "wide": partial(step_case, wide=True),
    "llama3": partial(llama3_case, form=None),
    "llama3-int4": partial(llama3_case, form="int4"),
    "llama3-fp8": partial(llama3_case, form="fp8"),
    "bytes": bytes_case,
    "batch": batch_case,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(["shapes", "kernel", *CASES]))
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

    def write() -> None:
        path.write_text(json.dumps(results, indent=1, default=str) + "\n")

    def run(name: str, case: Callable[[], object]) -> None:
        started = time.perf_counter()
        try:
            made = case()
            if isinstance(made, Iterator):
                results[name] = []
                for row in made:
                    results[name].append(row)
                    write()
                    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            else:
                results[name] = made
        except Exception:
            results[f"{name}, failed"] = traceback.format_exc()  # beside the rows that it gave before
            print(results[f"{name}, failed"][-600:])
        print(f"-- {name} [{time.perf_counter() - started:.0f} s]", flush=True)
        write()

    wanted = args.only.split(",")
    if "shapes" in wanted:
        run("shapes", lambda: check_shapes(2 if args.tiny else 60))
        print(results.get("shapes"))
    if "kernel" in wanted:
        if not args.tiny:
            run("compile", lambda: compile_kernels(sizes, sweep))
        for case in KERNEL_CASES[:: 4 if args.tiny else 1]:
            if args.tiny:
                case = (case[0], 9, 16, 8, *case[4:])
            run(case[0], partial(kernel_case, *case, sizes, sweep, bandwidth))
            if row := results.get(case[0]):
                print(
                    f"{row['case']}: target {row['target_us']}, floor {row['floor_us']:.0f}, default "
                    f"{row['default']['us']:.0f} (error {row['default'].get('error', float('nan')):.1e}), best "
                    f"{row['best']['us']:.0f} us with {row['best']['tiles']}, "
                    f"{row['share_of_copy_bandwidth']:.0%} of copy; "
                    f"torch {row['torch_us']:.0f}"
                )
    for name, rows in CASES.items():
        if name in wanted:
            run(name, partial(rows, sizes))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
