"""The Triton kernels behind `decode_attention`, in two stages: programs share the sequence, and a second kernel weighs
their outputs together.

All query heads share one key, so a program takes a tile of entries and all heads (times query tokens) that fit a
tensor-core tile: an entry comes from memory once for each 16 or 32 of them, and serves as key and as value. Columns
are padded to a power of two in registers only.
"""

try:  # within a try block, so that transformers does not ask the user of a checkpoint to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None


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

    @triton.jit
    def visible_scores(scores, given, tokens, ok, rows, row_ok, end, num_queries, scaling, MASK: tl.constexpr):
        """Scores [rows, tokens] as powers of two, minus infinity where a query must not look."""
        scores *= scaling * 1.4426950408889634
        seen = ok[None, :] & row_ok[:, None]
        if MASK == 1:
            seen = seen & (given != 0)
        elif MASK == 2:
            scores += given.to(tl.float32) * 1.4426950408889634
        else:  # causal: the queries are the last tokens
            seen = seen & (tokens[None, :] <= (end - num_queries + rows % num_queries)[:, None])
        return tl.where(seen, scores, float("-inf"))

    @triton.jit
    def soften(scores, top, total):
        """A tile of the softmax: weights, what earlier outputs fade by, and the new maximum and sum of each row."""
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no difference of infinities
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        return weights, fade, new_top, total * fade + tl.sum(weights, 1)

    @triton.jit(do_not_specialize=["num_rows", "num_queries", "num_tokens", "first_split", "num_splits"])
    def attend_split(
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
            else:
                given = 0
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

            scores = visible_scores(scores, given, tokens, ok, rows, row_ok, end, num_queries, scaling, MASK)
            weights, fade, top, total = soften(scores, top, total)
            if ONE_SCALE:
                weights = (weights * scale[None, :]).to(dtype)
                offset = offset * fade + tl.sum(weights.to(tl.float32) * zero[None, :], 1)
            else:
                weights = weights.to(dtype)
            low = tl.dot(weights, values, low * fade[:, None], input_precision=PRECISION)
            if BITS == 4:
                high = tl.dot(weights, values_high, high * fade[:, None], input_precision=PRECISION)

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
    def combine(partial, log_sums, output, num_splits, RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
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

else:
    attend_split = combine = visible_scores = soften = None
