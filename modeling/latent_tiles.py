"""Sizes of the decode kernels' launches: tiles that fit a device, and splits that fill it."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from .latent_quantization import CODE_BITS

# Of a wider latent a program of `attend_split` cannot hold the output.
MAX_RANK = 1024
# Columns of an entry, padding included, for which the registers and two tiles of `attend_split_wide` suffice.
MAX_WIDE_COLUMNS = 2560
# Numbers of output that one program can accumulate in registers (fp32, 256 threads, half of the file).
MAX_ACCUMULATORS = 32 * 1024
# Entries and words a tile, warps and stages that are tried for packed entries, in this order.
PACKED_SIZES = ((128, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2))
# Columns of a latent that half of the threads hold the output of.
NARROW_COLUMNS = 128


@dataclass
class Tiles:
    """Sizes of a launch. [`choose_tiles`] makes the default ones."""

    block_m: int = 16  # rows (head * T + query token) a program does
    block_n: int = 32  # entries a tile
    num_warps: int = 8
    num_stages: int = 2
    num_splits: int | None = None  # by default what fills the multiprocessors


@dataclass
class PackedTiles:
    """Sizes of a launch of `attend_split_packed`. [`choose_packed_tiles`] makes the default ones."""

    block_m: int = 32
    block_n: int = 128
    block_u: int = 128  # words a tile
    num_warps: int = 8
    num_stages: int = 3  # one more than buffers for a tile
    num_splits: int | None = None


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
    return WideTiles(block_c, padded_columns(-(-left // WideTiles.groups)))


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
        room = shared_memory(device)
        # Two tiles, the query but for its low part, scores in fp32 and what Triton adds.
        needed = element_size * (2 * tiles.block_n * columns + tiles.block_m * (columns - first))
        if needed + 4 * tiles.groups * tiles.block_m * tiles.block_n + 256 > room:
            return None
    return tiles


@lru_cache(maxsize=1024)
def choose_tiles(num_rows: int, rank: int, rope: int, element_size: int, device: torch.device) -> Tiles:
    """Tiles whose operands fit the device's registers and shared memory."""
    block_c, block_rope = padded_columns(rank), padded_columns(rope)
    block_m = max(16, min(32, next_power_of_2(num_rows), MAX_ACCUMULATORS // block_c))
    if device.type != "cuda":
        return Tiles(block_m)
    room = shared_memory(device)
    # A narrow entry of few heads is little work a tile: fewer, longer tiles, by half of the threads.
    narrow = block_c <= NARROW_COLUMNS and block_m == 16
    # Of the widest entries one long tile is worth more than the next one on its way.
    widest = block_c == MAX_RANK
    for block_n, buffers in ((128, 2),) * narrow + ((64, 2),) + ((64, 1),) * widest + ((32, 2), (16, 2), (16, 1)):
        needed = element_size * ((block_c + block_rope) * (block_m + buffers * block_n) + block_m * block_n)
        if needed <= room:
            break
    return Tiles(block_m, block_n, num_warps=4 if narrow else 8, num_stages=buffers + 1)


@lru_cache(maxsize=1024)
def choose_packed_tiles(num_rows: int, rank: int, rope: int, form: str, device: torch.device) -> PackedTiles:
    """Tiles of packed entries that fit the device's shared memory, where codes lie twice, as keys and as values, and
    in two buffers; with one buffer and smaller tiles, two programs share a multiprocessor."""
    num_parts = 16 // CODE_BITS[form]
    units, block_rope = -(-rank // num_parts), padded_columns(-(-rope // num_parts))
    block_m = max(16, min(32, next_power_of_2(num_rows), MAX_ACCUMULATORS // (2 * padded_columns(rank))))
    room = shared_memory(device) if device.type == "cuda" else 2**18
    for sizes in PACKED_SIZES:
        block_n, block_u, num_stages = sizes[0], min(sizes[1], padded_columns(units)), sizes[3]
        columns = -(-units // block_u) * block_u
        keys_and_values = 2 * block_n * (2 * columns + block_rope)
        needed = (num_stages - 1) * keys_and_values + 2 * block_m * (num_parts * (columns + block_rope) + block_n)
        if needed + 512 <= room:
            break
    return PackedTiles(block_m, block_n, block_u, *sizes[2:])


def next_power_of_2(size: int) -> int:
    """The smallest one that is not below `size`. Triton's own costs the host ten times as much."""
    return 1 << (size - 1).bit_length()


def padded_columns(size: int) -> int:
    """Columns of a section as a kernel holds them: a power of two."""
    return max(16, next_power_of_2(size))


def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@torch.compiler.assume_constant_result
def wide_tiles_fit(rank: int, width: int, device: torch.device) -> bool:
    return choose_wide_tiles(rank, width, 2, device) is not None


@lru_cache(maxsize=1024)
def choose_splits(
    num_programs: int, num_tokens: int, block_n: int, device: torch.device, per_processor: int = 1
) -> int:
    """Splits of the sequence for which the last wave of programs wastes least; each gets two tiles or more."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    processors *= per_processor
    most = min(max(1, num_tokens // (2 * block_n)), max(1, 4 * processors // num_programs), 128)
    # Waves times the work of a split, and a little for each split's partial output.
    return min(range(1, most + 1), key=lambda n: -(-num_programs * n // processors) / n * (1 + 0.005 * n))
