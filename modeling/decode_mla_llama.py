"""One decoding step over the latent cache in Triton: absorbed attention, split over the sequence, in two stages.

All query heads share one key, so a program takes a tile of entries and all heads (times query tokens) that fit a
tensor-core tile: an entry comes from memory once. Programs share the sequence; each leaves a partial output and the
logarithm of its softmax sum, and a second kernel weighs them together.

- Entries are [B, S, W] in any row strides, W = R + n*r. Columns are padded to a power of two in registers only.
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

try:  # within a try block, so that transformers does not ask the user of a checkpoint to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Of a wider latent a program cannot hold the output, and torch, which reads the entries twice, is faster.
MAX_RANK = 1024
# Numbers of output that one program can accumulate in registers (fp32, 256 threads, half of the file).
MAX_ACCUMULATORS = 32 * 1024


if triton is not None:

    @triton.jit
    def _load(entries, rows, ok, columns, first, SIZE: tl.constexpr):
        """Bytes or numbers of a section that begins at column `first` and has SIZE of them, [tokens, columns]."""
        inside = ok[:, None] & (columns < SIZE)[None, :]
        return tl.load(entries + rows[:, None] + (first + columns)[None, :], mask=inside, other=0)

    @triton.jit
    def _centre(raw, BITS: tl.constexpr, HIGH: tl.constexpr):
        """Codes less half their range, in fp32. A code becomes the low bits of 2^23's mantissa: an exact conversion
        that spares the conversion unit, which is several times slower. With 4 bits a byte holds two codes."""
        codes = raw
        if BITS == 4:
            codes = raw >> 4 if HIGH else raw & 15
        half: tl.constexpr = 8.0 if BITS == 4 else 128.0
        return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + half)

    @triton.jit
    def _scale_and_zero(exponents, zeros, BITS: tl.constexpr):
        """Scales, and zeros less half the range of the codes, from their bytes (see `quantize`)."""
        step: tl.constexpr = 1.0 if BITS == 8 else 15.0 / 255.0
        half: tl.constexpr = 8.0 if BITS == 4 else 128.0
        return tl.exp2(exponents.to(tl.float32) * 0.125 - 20.0), zeros.to(tl.float32) * step - half

    @triton.jit
    def _decode(raw, scales, rows, ok, columns, group, SIZE: tl.constexpr, GROUP: tl.constexpr,
                BITS: tl.constexpr, HIGH: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
        """Numbers from packed ones whose scales differ from column to column; `group`: where the section's begin."""
        logical = columns + (SIZE + 1) // 2 if HIGH else columns
        at = scales + rows[:, None] + 2 * (group + logical // GROUP)[None, :]
        inside = ok[:, None] & (logical < SIZE)[None, :]
        scale, zero = _scale_and_zero(tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0), BITS)
        return tl.where(inside, (_centre(raw, BITS, HIGH) - zero) * scale, 0.0).to(dtype)

    @triton.jit
    def _query(query, rows, ok, columns, SIZE: tl.constexpr, BITS: tl.constexpr, HIGH: tl.constexpr):
        """Columns of the query that meet those of an entry, [rows, columns]; `query` points to the section."""
        if HIGH:
            columns = columns + (SIZE + 1) // 2
        inside = columns < SIZE
        if BITS == 4 and not HIGH:
            inside = columns < (SIZE + 1) // 2
        return tl.load(query + rows[:, None] + columns[None, :], mask=ok[:, None] & inside[None, :], other=0.0)

    @triton.jit(do_not_specialize=["num_rows", "num_queries", "num_tokens", "first_split", "num_splits"])
    def _attend_split(
        query, entries, scales, mask, length, partial, log_sums, scaling, num_rows, num_queries, num_tokens,
        first_split, num_splits, stride_qb, stride_qm, stride_eb, stride_es, stride_sb, stride_ss,
        stride_mb, stride_mt, stride_ms,
        ALIGN: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, GROUP: tl.constexpr, ROPE_GROUP: tl.constexpr,
        BITS: tl.constexpr, MASK: tl.constexpr, ONE_QUERY: tl.constexpr, HAS_LENGTH: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROPE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """First stage. Grid: (row blocks, splits of this launch, batch); neighbours read the same entries.

        A program does BLOCK_M rows (head * T + query token) over one split. A tile of entries serves as keys and as
        values. Packed entries with one scale a token (ONE_SCALE) are multiplied as the small integers that they are:
        scale and zero are then factors of scores and weights, not of every number.

        Masks and scales of a tile are loaded a tile ahead; the entries of full precision Triton pipelines by itself.
        ALIGN divides all strides of the entries: without it, rows of 120 numbers would be read number by number.
        """
        STORED: tl.constexpr = (RANK + 1) // 2 if BITS == 4 else RANK
        ROPE_STORED: tl.constexpr = (ROPE + 1) // 2 if BITS == 4 else ROPE
        GROUPS: tl.constexpr = (RANK + GROUP - 1) // GROUP
        ONE_SCALE: tl.constexpr = BITS < 16 and GROUP >= RANK and ROPE_GROUP >= ROPE
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = rows < num_rows
        split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        query += batch * stride_qb
        entries += tl.multiple_of(batch * stride_eb, ALIGN)
        scales += batch * stride_sb
        mask += batch * stride_mb
        query_rows = rows * stride_qm

        end = num_tokens
        if HAS_LENGTH:
            end = tl.minimum(tl.load(length), num_tokens).to(tl.int32)
        per_split = tl.cdiv(tl.cdiv(end, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        begin = split * per_split
        stop = tl.minimum(begin + per_split, end)

        columns = tl.arange(0, BLOCK_C)
        rope_columns = tl.arange(0, BLOCK_ROPE)
        dtype: tl.constexpr = query.dtype.element_ty
        q_low = _query(query, query_rows, row_ok, columns, RANK, BITS, False)
        q_rope = _query(query + RANK, query_rows, row_ok, rope_columns, ROPE, BITS, False)
        if BITS == 4:
            q_high = _query(query, query_rows, row_ok, columns, RANK, BITS, True)
            q_rope_high = _query(query + RANK, query_rows, row_ok, rope_columns, ROPE, BITS, True)
        if ONE_SCALE:
            q_sum = tl.sum(q_low.to(tl.float32), 1)
            q_rope_sum = tl.sum(q_rope.to(tl.float32), 1)
            if BITS == 4:
                q_sum += tl.sum(q_high.to(tl.float32), 1)
                q_rope_sum += tl.sum(q_rope_high.to(tl.float32), 1)
            offset = tl.zeros([BLOCK_M], tl.float32)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        low = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if BITS == 4:
            high = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        tokens = begin + tl.arange(0, BLOCK_N)
        ok = tokens < stop
        if MASK > 0 and ONE_QUERY:
            next_given = tl.load(mask + tokens * stride_ms, mask=ok, other=0)
        if ONE_SCALE:
            next_scale = tl.load(scales + tokens.to(tl.int64) * stride_ss, mask=ok, other=0)
        for start in range(begin, stop, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            ok = tokens < stop
            ahead = tokens + BLOCK_N
            ahead_ok = ahead < stop
            if MASK > 0 and ONE_QUERY:
                given = next_given[None, :]
                next_given = tl.load(mask + ahead * stride_ms, mask=ahead_ok, other=0)
            elif MASK > 0:
                at = mask + (rows % num_queries)[:, None] * stride_mt + tokens[None, :] * stride_ms
                given = tl.load(at, mask=ok[None, :] & row_ok[:, None], other=0)
            token_rows = tl.multiple_of(tokens.to(tl.int64) * stride_es, ALIGN)
            raw = _load(entries, token_rows, ok, columns, 0, STORED)
            rope_raw = _load(entries, token_rows, ok, rope_columns, STORED, ROPE_STORED)

            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if ONE_SCALE:
                word = next_scale  # a scale and a zero of the latent, and of the rotary keys
                next_scale = tl.load(scales + ahead.to(tl.int64) * stride_ss, mask=ahead_ok, other=0)
                scale, zero = _scale_and_zero(word & 255, (word >> 8) & 255, BITS)
                rope_scale, rope_zero = _scale_and_zero((word >> 16) & 255, (word >> 24) & 255, BITS)
                values = _centre(raw, BITS, False).to(dtype)
                rope = _centre(rope_raw, BITS, False).to(dtype)
                scores = tl.dot(q_low, tl.trans(values), scores, input_precision=PRECISION)
                if BITS == 4:
                    values_high = _centre(raw, BITS, True).to(dtype)
                    scores = tl.dot(q_high, tl.trans(values_high), scores, input_precision=PRECISION)
                scores = (scores - q_sum[:, None] * zero[None, :]) * scale[None, :]
                rotary = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)
                if BITS == 4:
                    rope = _centre(rope_raw, BITS, True).to(dtype)
                    rotary = tl.dot(q_rope_high, tl.trans(rope), rotary, input_precision=PRECISION)
                scores += (rotary - q_rope_sum[:, None] * rope_zero[None, :]) * rope_scale[None, :]
            else:
                values, rope = raw, rope_raw
                scale_rows = tokens.to(tl.int64) * stride_ss
                if BITS < 16:
                    values = _decode(raw, scales, scale_rows, ok, columns, 0, RANK, GROUP, BITS, False, dtype)
                    rope = _decode(
                        rope_raw, scales, scale_rows, ok, rope_columns, GROUPS, ROPE, ROPE_GROUP, BITS, False, dtype
                    )
                scores = tl.dot(q_low, tl.trans(values), scores, input_precision=PRECISION)
                scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision=PRECISION)
                if BITS == 4:
                    values_high = _decode(raw, scales, scale_rows, ok, columns, 0, RANK, GROUP, BITS, True, dtype)
                    rope = _decode(
                        rope_raw, scales, scale_rows, ok, rope_columns, GROUPS, ROPE, ROPE_GROUP, BITS, True, dtype
                    )
                    scores = tl.dot(q_high, tl.trans(values_high), scores, input_precision=PRECISION)
                    scores = tl.dot(q_rope_high, tl.trans(rope), scores, input_precision=PRECISION)

            scores *= scaling * 1.4426950408889634  # powers of two below
            seen = ok[None, :] & row_ok[:, None]
            if MASK == 1:
                seen = seen & (given != 0)
            elif MASK == 2:
                scores += given.to(tl.float32) * 1.4426950408889634
            else:  # causal: the queries are the last tokens
                seen = seen & (tokens[None, :] <= (end - num_queries + rows % num_queries)[:, None])
            scores = tl.where(seen, scores, float("-inf"))

            new_top = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no difference of infinities
            weights = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(weights, 1)
            if ONE_SCALE:
                weights = (weights * scale[None, :]).to(dtype)
                offset = offset * fade + tl.sum(weights.to(tl.float32) * zero[None, :], 1)
            else:
                weights = weights.to(dtype)
            low = tl.dot(weights, values, low * fade[:, None], input_precision=PRECISION)
            if BITS == 4:
                high = tl.dot(weights, values_high, high * fade[:, None], input_precision=PRECISION)
            top = new_top

        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        place = (batch * num_rows + rows) * num_splits + first_split + split
        at = partial + place[:, None] * RANK + columns[None, :]
        if ONE_SCALE:
            low -= offset[:, None]
            if BITS == 4:
                high -= offset[:, None]
        tl.store(at, low * share, mask=row_ok[:, None] & (columns < STORED)[None, :])
        if BITS == 4:
            tl.store(at + STORED, high * share, mask=row_ok[:, None] & (columns < RANK - STORED)[None, :])
        # A row of no sum has the weight 0 in the second stage.
        log_sum = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(log_sums + place, log_sum, mask=row_ok)

    @triton.jit(do_not_specialize=["num_splits"])
    def _combine(partial, log_sums, output, num_splits, RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
        """Second stage. Grid: (batch * rows, column blocks): the weighted mean of the splits' outputs."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        splits = tl.arange(0, SPLITS)
        ok = splits < num_splits
        log_sum = tl.load(log_sums + row * num_splits + splits, mask=ok, other=float("-inf"))
        top = tl.max(log_sum, 0)
        weights = tl.exp2(log_sum - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weights, 0)
        weights = weights / tl.where(total > 0, total, 1.0)
        at = partial + (row * num_splits + splits)[:, None] * RANK + columns[None, :]
        parts = tl.load(at, mask=ok[:, None] & (columns < RANK)[None, :], other=0.0)
        mixed = tl.sum(parts * weights[:, None], 0)
        tl.store(output + row * RANK + columns, mixed.to(output.dtype.element_ty), mask=columns < RANK)


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


@lru_cache(maxsize=1024)
def choose_tiles(num_rows: int, rank: int, rope: int, element_size: int, nbits: int, device: torch.device) -> Tiles:
    """Tiles whose operands fit the device's registers and shared memory."""
    block_c, block_rope = padded_columns(rank, rope, nbits)
    accumulators = block_c * (2 if nbits == 4 else 1)
    block_m = max(16, min(32, triton.next_power_of_2(num_rows), MAX_ACCUMULATORS // accumulators))
    if device.type != "cuda":
        return Tiles(block_m)
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    for block_n, buffers in ((64, 2), (32, 2), (16, 2), (16, 1)):
        needed = element_size * ((block_c + block_rope) * (block_m + buffers * block_n) + block_m * block_n)
        if needed <= shared_memory:
            break
    return Tiles(block_m, block_n, num_stages=buffers + 1)


def padded_columns(rank: int, rope: int, nbits: int) -> tuple[int, int]:
    """Stored columns of latent and rotary keys as the kernel holds them: powers of two."""
    stored = ((rank + 1) // 2, (rope + 1) // 2) if nbits == 4 else (rank, rope)
    block_c, block_rope = (max(16, triton.next_power_of_2(size)) for size in stored)
    return block_c, block_rope


def kernel_can_run(tensor: torch.Tensor, rank: int) -> bool:
    """Whether Triton is there, and the tensor of 16-bit numbers, on a GPU, with a latent that the kernel serves."""
    return (
        triton is not None
        and tensor.is_cuda
        and tensor.dtype.itemsize == 2
        and rank <= MAX_RANK
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )


@lru_cache(maxsize=1024)
def choose_splits(num_programs: int, num_tokens: int, block_n: int, device: torch.device) -> int:
    """Splits of the sequence for which the last wave of programs wastes least; each gets two tiles or more."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    most = min(max(1, num_tokens // (2 * block_n)), max(1, 4 * processors // num_programs), 128)
    # Waves times the work of a split, and a little for each split's partial output.
    return min(range(1, most + 1), key=lambda n: -(-num_programs * n // processors) / n * (1 + 0.005 * n))


def decode_attention(
    query: torch.Tensor, parts: list[Part], rank: int, num_queries: int, scaling: float, tiles: Tiles | None = None
) -> torch.Tensor:
    """
    Softmax attention of absorbed queries over the entries of all parts together.

    Args:
        query (`torch.Tensor`): [B, H * T, R + n*r], row = head * T + query token, last dim contiguous.
        rank (`int`): R.
        num_queries (`int`): T.

    Returns:
        What the heads see of the latents, [B, H * T, R], in the query's dtype; accumulated in fp32.
    """
    batch, num_rows, width = query.shape
    rope = width - rank
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
        _attend_split[(programs, splits, batch)](
            query, part.entries, scales, mask, length, partial, log_sums, scaling, num_rows, num_queries,
            part.entries.shape[1], first_split, num_splits, query.stride(0), query.stride(1),
            part.entries.stride(0), part.entries.stride(1), scales.stride(0), scales.stride(1), *strides,
            ALIGN=align, RANK=rank, ROPE=rope, GROUP=part.group_size, ROPE_GROUP=part.rope_group_size,
            BITS=part.nbits, MASK=kind, ONE_QUERY=num_queries == 1, HAS_LENGTH=part.length is not None,
            BLOCK_M=sizes.block_m, BLOCK_N=sizes.block_n, BLOCK_C=block_c, BLOCK_ROPE=block_rope,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=sizes.num_warps, num_stages=sizes.num_stages,
        )  # fmt: skip
    output = torch.empty(batch, num_rows, rank, dtype=query.dtype, device=query.device)
    block = min(256, triton.next_power_of_2(rank))
    _combine[(batch * num_rows, -(-rank // block))](
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
