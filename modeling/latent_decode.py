"""One decoding step over the latent cache in Triton: absorbed attention, split over the sequence, in two stages.

This is the host's side; `latent_tiles.py` says which tiles, and how many programs. The kernels are in
`latent_kernels.py`; the one for packed entries is in `latent_packed_kernel.py`, the one for latents of more than 1,024
numbers in `latent_wide_kernel.py`.

- Entries are [B, S, W] in any row strides, W = R + n*r.
- The number of entries may be a tensor on the device (static cache): nothing here waits for the device, the grid
  depends on shapes only, and a CUDA graph of the step holds for every length.
- Masks are read as transformers gives them, boolean or additive, [B, 1, T, S]: left padding, several query tokens.
  A query that may see nothing gets zeros.
- Packed entries (`LatentQuantizedLayer`) are read as they lie and become numbers in registers.

Without Triton or a GPU the module imports all the same; [`kernel_can_run`] then says no, and torch does the work.
"""

import math
from dataclasses import dataclass

import torch

from .latent_kernels import attend_split, combine, triton
from .latent_packed_kernel import attend_split_packed
from .latent_quantization import CODE_BITS
from .latent_tiles import (
    MAX_RANK,
    PackedTiles,
    Tiles,
    WideTiles,
    choose_packed_tiles,
    choose_splits,
    choose_tiles,
    choose_wide_tiles,
    next_power_of_2,
    padded_columns,
    wide_tiles_fit,
)
from .latent_wide_kernel import attend_split_wide


@dataclass
class Part:
    """
    A stretch of the cache for [`decode_attention`].

    Args:
        entries (`torch.Tensor`): Numbers [B, S, R + n*r], or words of codes (`pack`), last dim contiguous.
        mask (`torch.Tensor`, *optional*): Boolean or additive, [B or 1, 1, T, >= S]. Without one, the T queries are
            the last T of the S entries, and see those before them and themselves.
        length (`torch.Tensor`, *optional*): Number of entries written, on the device; by default all S.
        ring (`bool`): The entries are a window as `ring_positions` tells; `length` counts all tokens of the sequence.
        form (`str`, *optional*): Of packed entries, one of `CODE_BITS`.
        scales (`torch.Tensor`, *optional*): Of packed entries, [B, S, 2 * groups], uint8.
        group_size, rope_group_size (`int`): Columns that share a scale, in the latent and in the rotary keys.
    """

    entries: torch.Tensor
    mask: torch.Tensor | None = None
    length: torch.Tensor | None = None
    ring: bool = False
    form: str | None = None
    scales: torch.Tensor | None = None
    group_size: int = 1
    rope_group_size: int = 1


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


def decode_attention(
    query: torch.Tensor,
    parts: list[Part],
    rank: int,
    num_queries: int,
    scaling: float,
    tiles: Tiles | PackedTiles | WideTiles | None = None,
) -> torch.Tensor:
    """
    Softmax attention of absorbed queries over the entries of all parts together.

    Args:
        query (`torch.Tensor`): [B, H * T, R + n*r], row = head * T + query token, last dim contiguous.
        rank (`int`): R.
        num_queries (`int`): T.
        tiles (*optional*): By default those for this R. `Tiles` and `PackedTiles` are for the parts that they suit;
            `WideTiles` ask for `attend_split_wide`, which takes one part, unpacked.

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
        sizes = _sizes(part, num_rows, rank, rope, query, tiles)
        programs = -(-num_rows // sizes.block_m)
        # Where a program leaves half of a multiprocessor's registers and shared memory, a second one works beside it.
        beside = 2 if isinstance(sizes, PackedTiles) and sizes.num_warps == 4 else 1
        splits = sizes.num_splits or choose_splits(
            programs * batch, part.entries.shape[1], sizes.block_n, query.device, beside
        )
        launches.append((part, sizes, programs, splits, num_splits))
        num_splits += splits
    partial = torch.empty(batch, num_rows, num_splits, rank, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(batch, num_rows, num_splits, dtype=torch.float32, device=query.device)
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    for part, sizes, programs, splits, first_split in launches:
        entries, grid = part.entries, (programs, splits, batch)
        mask, kind, mask_strides = _mask_arguments(part.mask, query)
        length = query if part.length is None else part.length
        counts = (num_rows, num_queries, entries.shape[1], first_split, num_splits)
        strides = (query.stride(0), query.stride(1), entries.stride(0), entries.stride(1))
        common = dict(
            ALIGN=math.gcd(entries.stride(0), entries.stride(1), 16), RANK=rank, ROPE=rope, MASK=kind,
            ONE_QUERY=num_queries == 1, HAS_LENGTH=part.length is not None, BLOCK_M=sizes.block_m,
            BLOCK_N=sizes.block_n, PRECISION=precision, num_warps=sizes.num_warps, num_stages=sizes.num_stages,
        )  # fmt: skip
        if isinstance(sizes, PackedTiles):
            scales, groups, half = part.scales, (part.group_size, part.rope_group_size), query.element_size() == 2
            assert scales is not None and part.form is not None
            if groups[0] >= rank and groups[1] >= rope:
                scales, groups = scales.view(torch.int32), (0, 0)  # the four bytes of a token
            attend_split_packed[grid](
                query, entries, scales, mask, length, partial, log_sums, scaling, *counts, *strides, scales.stride(0),
                scales.stride(1), *mask_strides, GROUP=groups[0], ROPE_GROUP=groups[1], FORM=part.form,
                BLOCK_U=sizes.block_u, BLOCK_ROPE=padded_columns(-(-rope * CODE_BITS[part.form] // 16)),
                PTX=half and can_use_ptx(query.device), SMALL=torch.version.hip is None,
                HALF=half and groups == (0, 0), **common,
            )  # fmt: skip
        else:
            attend_split[grid](
                query, entries, mask, length, partial, log_sums, scaling, *counts, *strides, *mask_strides,
                RING=part.ring, BLOCK_C=padded_columns(rank), BLOCK_ROPE=padded_columns(rope), **common,
            )  # fmt: skip
    return _combine(query, partial, log_sums, rank)


def _sizes(part: Part, num_rows: int, rank: int, rope: int, query: torch.Tensor, tiles) -> Tiles | PackedTiles:
    """The tiles asked for if they suit the part, else the default ones."""
    if part.form is not None:
        if isinstance(tiles, PackedTiles):
            return tiles
        return choose_packed_tiles(num_rows, rank, rope, part.form, query.device)
    return (
        tiles if isinstance(tiles, Tiles) else choose_tiles(num_rows, rank, rope, query.element_size(), query.device)
    )


@torch.compiler.assume_constant_result
def can_use_ptx(device: torch.device) -> bool:
    """Whether the device has the instructions by which codes become numbers: CUDA, from compute capability 8.9."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


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
    block = min(256, next_power_of_2(rank))
    combine[(batch * num_rows, -(-rank // block))](
        partial, log_sums, output, num_splits, RANK=rank, SPLITS=next_power_of_2(num_splits), BLOCK=block
    )
    return output


def _mask_arguments(mask: torch.Tensor | None, query: torch.Tensor) -> tuple[torch.Tensor, int, tuple[int, int, int]]:
    """Pointer, kind (0 none, 1 boolean, 2 additive) and strides of batch, query token and entry, 0 where broadcast."""
    if mask is None:
        return query, 0, (0, 0, 0)
    kind = 1 if mask.dtype == torch.bool else 2
    strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2), mask.stride(3))
    return (mask.view(torch.uint8) if kind == 1 else mask), kind, strides


# One node in a compiled graph, so that neither dynamo nor inductor has to understand the launches. The lists hold what
# is in each `Part`; no form is "".
@torch.library.custom_op("mha2mla::decode_attention", mutates_args=())
def decode_attention_op(
    query: torch.Tensor,
    entries: list[torch.Tensor],
    masks: list[torch.Tensor | None],
    lengths: list[torch.Tensor | None],
    scales: list[torch.Tensor | None],
    rings: list[bool],
    forms: str,
    group_sizes: list[int],
    rank: int,
    num_queries: int,
    scaling: float,
) -> torch.Tensor:
    """[`decode_attention`] for `torch.compile`, by [`decode_attention_in_graph`]."""
    held = zip(entries, masks, lengths, rings, forms.split(","), scales, strict=True)
    parts = [
        Part(entry, mask, length, ring, form or None, scale, group_sizes[0], group_sizes[1])
        for entry, mask, length, ring, form, scale in held
    ]
    return decode_attention(query, parts, rank, num_queries, scaling)


@decode_attention_op.register_fake
def _(query, entries, masks, lengths, scales, rings, forms, group_sizes, rank, num_queries, scaling):
    return query.new_empty(*query.shape[:2], rank)


def decode_attention_in_graph(
    query: torch.Tensor, parts: list[Part], rank: int, num_queries: int, scaling: float
) -> torch.Tensor:
    """[`decode_attention`] as one node of a graph that is being compiled."""
    groups = [[part.group_size, part.rope_group_size] for part in parts if part.form is not None]
    return decode_attention_op(
        query,
        [part.entries for part in parts],
        [part.mask for part in parts],
        [part.length for part in parts],
        [part.scales for part in parts],
        [part.ring for part in parts],
        ",".join(part.form or "" for part in parts),
        groups[0] if groups else [1, 1],
        rank,
        num_queries,
        scaling,
    )
