"""One decoding step over the latent cache in Triton: absorbed attention, split over the sequence, in two stages.

This is the host's side: which tiles, how many programs, when. The kernels are in `latent_kernels.py`, and in
`latent_wide_kernel.py` the one for latents of more than 1,024 numbers.

- Entries are [B, S, W] in any row strides, W = R + n*r.
- The number of entries may be a tensor on the device (static cache): nothing here waits for the device, the grid
  depends on shapes only, and a CUDA graph of the step holds for every length.
- Masks are read as transformers gives them, boolean or additive, [B, 1, T, S]: left padding, several query tokens.
  A query that may see nothing gets zeros.
- Packed 4 and 8 bit entries (`LatentQuantizedLayer`) are read as they lie and become numbers in registers.

Without Triton or a GPU the module imports all the same; [`kernel_can_run`] then says no, and torch does the work.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from .latent_kernels import attend_split, combine, triton
from .latent_wide_kernel import attend_split_wide

# Of a wider latent a program of `attend_split` cannot hold the output.
MAX_RANK = 1024
# Columns of an entry, padding included, for which the registers and two tiles of `attend_split_wide` suffice.
MAX_WIDE_COLUMNS = 2560
# Numbers of output that one program can accumulate in registers (fp32, 256 threads, half of the file).
MAX_ACCUMULATORS = 32 * 1024
# Columns of a latent that half of the threads hold the output of.
NARROW_COLUMNS = 128


@dataclass
class Part:
    """
    A stretch of the cache for [`decode_attention`].

    Args:
        entries (`torch.Tensor`): Numbers [B, S, R + n*r], or the bytes of `LatentQuantizedLayer`, last dim contiguous.
        mask (`torch.Tensor`, *optional*): Boolean or additive, [B or 1, 1, T, >= S]. Without one, the T queries are
            the last T of the S entries, and see those before them and themselves.
        length (`torch.Tensor`, *optional*): Number of entries written, on the device; by default all S.
        scales (`torch.Tensor`, *optional*): [B, S, 2 * groups], uint8, if the entries are packed.
        nbits (`int`): 16 for numbers of any width, 8 or 4.
        group_size, rope_group_size (`int`): Columns that share a scale, in the latent and in the rotary keys.
    """

    entries: torch.Tensor
    mask: torch.Tensor | None = None
    length: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    nbits: int = 16
    group_size: int = 1
    rope_group_size: int = 1


@dataclass
class Tiles:
    """Sizes of a launch. [`choose_tiles`] makes the default ones."""

    block_m: int = 16  # rows (head * T + query token) a program does
    block_n: int = 32  # entries a tile
    num_warps: int = 8
    num_stages: int = 2
    num_splits: int | None = None  # by default what fills the multiprocessors


@dataclass
class WideTiles:
    """Sizes of a launch of `attend_split_wide`. [`choose_wide_tiles`] makes the default ones."""

    block_c: int = 128  # columns of a group, of the low ones and of as many high ones
    block_rest: int = 64  # columns of a group of those behind them
    groups: int = 8  # one a warp
    num_splits: int | None = None

    block_m = 16
    block_n = 16

    @property
    def columns(self) -> int:
        return self.groups * (2 * self.block_c + self.block_rest)


def fit_columns(width: int, block_c: int) -> WideTiles:
    """Tiles of so many low and high columns a group, and room behind them for what is left of the width."""
    left = max(1, width - 2 * WideTiles.groups * block_c)
    return WideTiles(block_c, max(16, triton.next_power_of_2(-(-left // WideTiles.groups))))


@lru_cache(maxsize=1024)
def choose_wide_tiles(rank: int, width: int, element_size: int, device: torch.device) -> WideTiles | None:
    """Tiles for entries of R > 1,024, or None where registers or shared memory do not suffice for two of them: torch,
    which reads the entries twice, then does the work."""
    least = 2 ** int(math.log2(rank)) // (2 * WideTiles.groups)
    tiles = min((fit_columns(width, block_c) for block_c in (least, 2 * least)), key=lambda t: t.columns)
    columns, first = tiles.columns, tiles.groups * tiles.block_c
    if columns > MAX_WIDE_COLUMNS:
        return None
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        # Two tiles, the query but for its low part, scores in fp32 and what Triton adds.
        needed = element_size * (2 * tiles.block_n * columns + tiles.block_m * (columns - first))
        if needed + 4 * tiles.groups * tiles.block_m * tiles.block_n + 256 > room:
            return None
    return tiles


@lru_cache(maxsize=1024)
def choose_tiles(num_rows: int, rank: int, rope: int, element_size: int, nbits: int, device: torch.device) -> Tiles:
    """Tiles whose operands fit the device's registers and shared memory."""
    block_c, block_rope = padded_columns(rank, rope, nbits)
    accumulators = block_c * (2 if nbits == 4 else 1)
    block_m = max(16, min(32, triton.next_power_of_2(num_rows), MAX_ACCUMULATORS // accumulators))
    if device.type != "cuda":
        return Tiles(block_m)
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    # A narrow entry of few heads is little work a tile: fewer, longer tiles, by half of the threads.
    narrow = nbits == 16 and block_c <= NARROW_COLUMNS and block_m == 16
    for block_n, buffers in ((128, 2),) * narrow + ((64, 2), (32, 2), (16, 2), (16, 1)):
        needed = element_size * ((block_c + block_rope) * (block_m + buffers * block_n) + block_m * block_n)
        if needed <= shared_memory:
            break
    return Tiles(block_m, block_n, num_warps=4 if narrow else 8, num_stages=buffers + 1)


def padded_columns(rank: int, rope: int, nbits: int) -> tuple[int, int]:
    """Stored columns of latent and rotary keys as the kernel holds them: powers of two."""
    stored = ((rank + 1) // 2, (rope + 1) // 2) if nbits == 4 else (rank, rope)
    block_c, block_rope = (max(16, triton.next_power_of_2(size)) for size in stored)
    return block_c, block_rope


def kernel_can_run(entries: torch.Tensor, rank: int, packed: bool = False) -> bool:
    """
    Whether a kernel serves this: Triton is there, and the numbers are of 16 bits and on a GPU that has room for them.

    Args:
        entries (`torch.Tensor`): [..., R + n*r].
        rank (`int`): R.
        packed (`bool`): Whether a part of the cache is packed, which the kernel for R > 1,024 does not read.
    """
    if triton is None or not entries.is_cuda or entries.dtype.itemsize != 2:
        return False
    if torch.cuda.get_device_capability(entries.device) < (8, 0):
        return False
    if rank <= MAX_RANK:
        return True
    return not packed and wide_tiles_fit(rank, entries.shape[-1], entries.device)


@torch.compiler.assume_constant_result
def wide_tiles_fit(rank: int, width: int, device: torch.device) -> bool:
    return choose_wide_tiles(rank, width, 2, device) is not None


@lru_cache(maxsize=1024)
def choose_splits(num_programs: int, num_tokens: int, block_n: int, device: torch.device) -> int:
    """Splits of the sequence for which the last wave of programs wastes least; each gets two tiles or more."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    most = min(max(1, num_tokens // (2 * block_n)), max(1, 4 * processors // num_programs), 128)
    # Waves times the work of a split, and a little for each split's partial output.
    return min(range(1, most + 1), key=lambda n: -(-num_programs * n // processors) / n * (1 + 0.005 * n))


def decode_attention(
    query: torch.Tensor,
    parts: list[Part],
    rank: int,
    num_queries: int,
    scaling: float,
    tiles: Tiles | WideTiles | None = None,
) -> torch.Tensor:
    """
    Softmax attention of absorbed queries over the entries of all parts together.

    Args:
        query (`torch.Tensor`): [B, H * T, R + n*r], row = head * T + query token, last dim contiguous.
        rank (`int`): R.
        num_queries (`int`): T.
        tiles (`Tiles` or `WideTiles`, *optional*): By default those for this R; `WideTiles` ask for
            `attend_split_wide`, which takes one part, unpacked.

    Returns:
        What the heads see of the latents, [B, H * T, R], in the query's dtype; accumulated in fp32.
    """
    batch, num_rows, width = query.shape
    rope = width - rank
    if tiles is None and rank > MAX_RANK:
        tiles = choose_wide_tiles(rank, width, query.element_size(), query.device)
    if isinstance(tiles, WideTiles):
        (part,) = parts
        return _attend_wide(query, part, rank, num_queries, scaling, tiles)
    launches, num_splits = [], 0
    for part in parts:
        block_c, block_rope = padded_columns(rank, rope, part.nbits)
        sizes = tiles or choose_tiles(num_rows, rank, rope, query.element_size(), part.nbits, query.device)
        programs = -(-num_rows // sizes.block_m)
        num_tokens = part.entries.shape[1]
        splits = sizes.num_splits or choose_splits(programs * batch, num_tokens, sizes.block_n, query.device)
        launches.append((part, sizes, block_c, block_rope, programs, splits, num_splits))
        num_splits += splits
    partial = torch.empty(batch, num_rows, num_splits, rank, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(batch, num_rows, num_splits, dtype=torch.float32, device=query.device)
    for part, sizes, block_c, block_rope, programs, splits, first_split in launches:
        mask, kind, strides = _mask_arguments(part.mask, query)
        scales = query if part.scales is None else part.scales
        if part.nbits < 16 and part.group_size >= rank and part.rope_group_size >= rope:
            scales = scales.view(torch.int32)  # the four bytes of a token
        align = math.gcd(part.entries.stride(0), part.entries.stride(1), 16)
        length = query if part.length is None else part.length
        attend_split[(programs, splits, batch)](
            query, part.entries, scales, mask, length, partial, log_sums, scaling, num_rows, num_queries,
            part.entries.shape[1], first_split, num_splits, query.stride(0), query.stride(1),
            part.entries.stride(0), part.entries.stride(1), scales.stride(0), scales.stride(1), *strides,
            ALIGN=align, RANK=rank, ROPE=rope, GROUP=part.group_size, ROPE_GROUP=part.rope_group_size,
            BITS=part.nbits, MASK=kind, ONE_QUERY=num_queries == 1, HAS_LENGTH=part.length is not None,
            BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n, BLOCK_C=block_c, BLOCK_ROPE=block_rope,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=sizes.num_warps, num_stages=sizes.num_stages,
        )  # fmt: skip
    return _combine(query, partial, log_sums, rank)


def _attend_wide(
    query: torch.Tensor, part: Part, rank: int, num_queries: int, scaling: float, tiles: WideTiles
) -> torch.Tensor:
    batch, num_rows, width = query.shape
    entries, num_tokens = part.entries, part.entries.shape[1]
    programs = -(-num_rows // tiles.block_m)
    splits = tiles.num_splits or choose_splits(programs * batch, num_tokens, tiles.block_n, query.device)
    partial = torch.empty(batch, num_rows, splits, rank, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(batch, num_rows, splits, dtype=torch.float32, device=query.device)
    mask, kind, strides = _mask_arguments(part.mask, query)
    length = query if part.length is None else part.length
    attend_split_wide[(programs, splits, batch)](
        query, entries, mask, length, partial, log_sums, scaling, num_rows, num_queries, num_tokens, splits,
        query.stride(0), query.stride(1), entries.stride(0), *strides, stride_es=entries.stride(1),
        ALIGN=math.gcd(entries.stride(0), entries.stride(1), 16), RANK=rank, WIDTH=width, MASK=kind,
        ONE_QUERY=num_queries == 1, HAS_LENGTH=part.length is not None, GROUPS=tiles.groups, BLOCK_N=tiles.block_n,
        BLOCK_C=tiles.block_c, BLOCK_REST=tiles.block_rest,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=8, num_stages=3,
    )  # fmt: skip
    return _combine(query, partial, log_sums, rank)


def _combine(query: torch.Tensor, partial: torch.Tensor, log_sums: torch.Tensor, rank: int) -> torch.Tensor:
    """The second stage, from partial outputs [B, H * T, splits, R]."""
    batch, num_rows, num_splits = log_sums.shape
    output = torch.empty(batch, num_rows, rank, dtype=query.dtype, device=query.device)
    block = min(256, triton.next_power_of_2(rank))
    combine[(batch * num_rows, -(-rank // block))](
        partial, log_sums, output, num_splits, RANK=rank, SPLITS=triton.next_power_of_2(num_splits), BLOCK=block
    )
    return output


def _mask_arguments(mask: torch.Tensor | None, query: torch.Tensor) -> tuple[torch.Tensor, int, tuple[int, int, int]]:
    """Pointer, kind (0 none, 1 boolean, 2 additive) and strides of batch, query token and entry, 0 where broadcast."""
    if mask is None:
        return query, 0, (0, 0, 0)
    kind = 1 if mask.dtype == torch.bool else 2
    strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2), mask.stride(3))
    return (mask.view(torch.uint8) if kind == 1 else mask), kind, strides


# One node in a compiled graph, so that neither dynamo nor inductor has to understand the launches.
@torch.library.custom_op("mha2mla::decode_attention", mutates_args=())
def decode_attention_op(
    query: torch.Tensor,
    entries: torch.Tensor,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    rank: int,
    num_queries: int,
    scaling: float,
) -> torch.Tensor:
    """[`decode_attention`] over one part, for `torch.compile`."""
    return decode_attention(query, [Part(entries, mask, length)], rank, num_queries, scaling)


@decode_attention_op.register_fake
def _(query, entries, mask, length, rank, num_queries, scaling):
    return query.new_empty(*query.shape[:2], rank)
