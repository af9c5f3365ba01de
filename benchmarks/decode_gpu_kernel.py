"""The decode kernel by itself: its cases with their tiles, timed, and random shapes against fp64."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from mha2mla.evaluation.speed.timing import time_calls
from mha2mla.modeling.latent_decode import MAX_RANK, PackedTiles, Part, Tiles, decode_attention
from mha2mla.modeling.latent_quantization import CODE_BITS, dequantize, pack, quantize, unpack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# heads, R, rotary columns, format of packed entries, whether mask and length are given as a static cache does,
# microseconds wanted
KERNEL_CASES = [
    ("32 heads, R=512 + 64", 32, 512, 64, None, False, 135),
    ("32 heads, R=512 + 64, mask and length", 32, 512, 64, None, True, 135),
    ("32 heads, R=512 + 64, int4", 32, 512, 64, "int4", False, 70),
    ("32 heads, R=512 + 64, int8", 32, 512, 64, "int8", False, 85),
    ("32 heads, R=512 + 64, fp8", 32, 512, 64, "fp8", False, 80),
    ("32 heads, R=512 + 64, int4, mask and length", 32, 512, 64, "int4", True, 70),
    ("9 heads, R=80 + 40", 9, 80, 40, None, True, 40),
    ("32 heads, R=1024 + 64", 32, 1024, 64, None, True, 270),
    ("32 heads, R=2048 + 32x16", 32, 2048, 512, None, False, 600),
    ("32 heads, R=2048 + 32x16, mask and length", 32, 2048, 512, None, True, 600),
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
# The same for packed entries, and before num_warps words a tile.
PACKED_SWEEP = [(32, 128, 128, 8, 3), (32, 128, 128, 8, 2), (32, 64, 64, 4, 3), (32, 64, 64, 4, 2)]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def make_part(
    batch: int, tokens: int, rank: int, rope: int, form: str | None, masked: bool, dtype
) -> tuple[Part, torch.Tensor]:
    """Random entries for the kernel, and the numbers they stand for (made a few tokens at a time)."""
    numbers = torch.randn(batch, tokens, rank + rope, device=DEVICE).to(dtype)
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=DEVICE) if masked else None
    length = torch.tensor([tokens], device=DEVICE) if masked else None
    if form is None:
        return Part(numbers, mask, length), numbers
    codes, scales, nbits = [], [], CODE_BITS[form]
    for piece in numbers.split(512, dim=1):
        made = [quantize(x, form, x.shape[-1]) for x in piece.split([rank, rope], -1)]
        codes.append(torch.cat([pack(c, nbits) for c, _ in made], -1))
        scales.append(torch.cat([s for _, s in made], -1))
        back = [dequantize(unpack(pack(c, nbits), nbits, c.shape[-1]), s, form, c.shape[-1]) for c, s in made]
        piece.copy_(torch.cat(back, -1))
    return Part(torch.cat(codes, 1), mask, length, False, form, torch.cat(scales, 1), rank, rope), numbers


def tiles_to_try(rank: int, form: str | None, sweep) -> list[Tiles | PackedTiles | None]:
    """The default, and the sweep's for the kernel that it is for."""
    if rank > MAX_RANK:
        return [None]
    if form is not None:
        return [None, *(PackedTiles(*sizes) for sizes in PACKED_SWEEP * (sweep is SWEEP))]
    return [None, *(Tiles(*sizes) for sizes in sweep)]


def compile_kernel(case: tuple, tiles: Tiles | PackedTiles | None, dtype) -> None:
    """Run one variant once at a small size, in a process of its own: its binary is then in Triton's cache."""
    _, heads, rank, rope, form, masked, _ = case
    try:
        part, _ = make_part(1, 256, rank, rope, form, masked, dtype)
        decode_attention(torch.randn(1, heads, rank + rope, device=DEVICE).to(dtype), [part], rank, 1, 0.05, tiles)
    except Exception:  # reported where it is timed
        pass


def compile_kernels(sizes, sweep) -> None:
    jobs = [(case, tiles) for case in KERNEL_CASES for tiles in tiles_to_try(case[2], case[4], sweep)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(compile_kernel, case, tiles, sizes["dtype"]) for case, tiles in jobs]:
            job.result()


def kernel_case(name, heads, rank, rope, form, masked, target, sizes, sweep, bandwidth) -> dict:
    """Time of one layer's attention by the kernel, with its best tiles and its default ones, and by torch."""
    batch, tokens, dtype = sizes["batch"], sizes["context"], sizes["dtype"]
    part, numbers = make_part(batch, tokens, rank, rope, form, masked, dtype)
    query = torch.randn(batch, heads, rank + rope, device=DEVICE).to(dtype)
    scaling = 0.05
    expected = torch.cat(  # in fp64, one sequence at a time
        [
            (q.double() @ e.double().T * scaling).softmax(-1).unsqueeze(0) @ e[:, :rank].double()
            for q, e in zip(query, numbers, strict=True)
        ]
    )
    variants: list[dict] = []
    for tiles in tiles_to_try(rank, form, sweep):
        label = (
            "default" if tiles is None else f"{tiles.block_m}/{tiles.block_n}/{tiles.num_warps}w/{tiles.num_stages}s"
        )
        try:
            attention = partial(decode_attention, query, [part], rank, 1, scaling, tiles)
            wrong = error(attention(), expected)
            variants.append(dict(tiles=label, us=time_calls(attention, DEVICE, 0.2) * 1e6, error=wrong))
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
