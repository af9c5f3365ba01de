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
        """Numbers of a section that begins at column `first` and has SIZE of them, [tokens, columns]."""
        inside = ok[:, None] & (columns < SIZE)[None, :]
        return tl.load(entries + rows[:, None] + (first + columns)[None, :], mask=inside, other=0)

    @triton.jit
    def _query(query, rows, ok, columns, SIZE: tl.constexpr):
        """Columns of the query that meet those of an entry, [rows, columns]; `query` points to the section."""
        inside = ok[:, None] & (columns < SIZE)[None, :]
        return tl.load(query + rows[:, None] + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def ring_positions(slots, count, size):
        """Positions of the tokens in the slots of a window that holds the first token and a ring of the newest `size`
        of the others; -1 in slots that nothing was written to. See `LatentStaticQuantizedLayer`."""
        newest = count - 1
        position = newest - (newest - slots + size) % size
        return tl.where(slots == 0, tl.minimum(0, newest), tl.where(position > 0, position, -1))

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
        query, entries, mask, length, partial, log_sums, scaling, num_rows, num_queries, num_tokens,
        first_split, num_splits, stride_qb, stride_qm, stride_eb, stride_es, stride_mb, stride_mt, stride_ms,
        ALIGN: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
        MASK: tl.constexpr, ONE_QUERY: tl.constexpr, HAS_LENGTH: tl.constexpr, RING: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROPE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """First stage. Grid: (row blocks, splits of this launch, batch); neighbours read the same entries.

        A program does BLOCK_M rows (head * T + query token) over one split. A tile of entries serves as keys and as
        values. With RING, entries lie as `ring_positions` tells, and `length` counts all tokens of the sequence.

        The mask of a tile is loaded a tile ahead; entries Triton pipelines by itself. ALIGN divides all strides of the
        entries: without it, rows of 120 numbers would be read number by number.
        """
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = rows < num_rows
        split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        query += batch * stride_qb
        entries += tl.multiple_of(batch * stride_eb, ALIGN)
        mask += batch * stride_mb
        query_rows = rows * stride_qm

        end = num_tokens
        if RING:
            count = tl.load(length).to(tl.int32)
        elif HAS_LENGTH:
            end = tl.minimum(tl.load(length), num_tokens).to(tl.int32)
        per_split = tl.cdiv(tl.cdiv(end, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        begin = split * per_split
        stop = tl.minimum(begin + per_split, end)

        columns = tl.arange(0, BLOCK_C)
        rope_columns = tl.arange(0, BLOCK_ROPE)
        dtype: tl.constexpr = query.dtype.element_ty
        q_low = _query(query, query_rows, row_ok, columns, RANK)
        q_rope = _query(query + RANK, query_rows, row_ok, rope_columns, ROPE)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        low = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if MASK > 0 and ONE_QUERY:
            tokens = begin + tl.arange(0, BLOCK_N)
            places = ring_positions(tokens, count, num_tokens - 1) if RING else tokens
            next_given = tl.load(mask + places * stride_ms, mask=(tokens < stop) & (places >= 0), other=0)
        for start in range(begin, stop, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            ok = tokens < stop
            places = tokens
            if RING:
                places = ring_positions(tokens, count, num_tokens - 1)
                ok = ok & (places >= 0)
            if MASK > 0 and ONE_QUERY:
                ahead = tokens + BLOCK_N
                ahead_places = ring_positions(ahead, count, num_tokens - 1) if RING else ahead
                given = next_given[None, :]
                next_given = tl.load(
                    mask + ahead_places * stride_ms, mask=(ahead < stop) & (ahead_places >= 0), other=0
                )
            elif MASK > 0:
                at = mask + (rows % num_queries)[:, None] * stride_mt + places[None, :] * stride_ms
                given = tl.load(at, mask=ok[None, :] & row_ok[:, None], other=0)
            else:
                given = 0
            token_rows = tl.multiple_of(tokens.to(tl.int64) * stride_es, ALIGN)
            values = _load(entries, token_rows, ok, columns, 0, RANK)
            rope = _load(entries, token_rows, ok, rope_columns, RANK, ROPE)

            scores = tl.dot(q_low, tl.trans(values), input_precision=PRECISION)
            scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision=PRECISION)
            scores = visible_scores(
                scores, given, places, ok, rows, row_ok, count if RING else end, num_queries, scaling, MASK
            )
            weights, fade, top, total = soften(scores, top, total)
            low = tl.dot(weights.to(dtype), values, low * fade[:, None], input_precision=PRECISION)

        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        place = (batch * num_rows + rows) * num_splits + first_split + split
        at = partial + place[:, None] * RANK + columns[None, :]
        tl.store(at, low * share, mask=row_ok[:, None] & (columns < RANK)[None, :])
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
    attend_split = combine = visible_scores = soften = ring_positions = None
