"""The Triton kernel behind `decode_attention` for latents too wide for `attend_split`.

A program takes 16 rows (head * T + query token) and all columns. Neighbours, which do the other rows, read the same
entries at about the same time: an entry comes from memory once, and from the L2 cache after that. The columns are
shared out over the warps: a tile is [GROUPS, 16 entries, columns], a batch of small products with a group a warp, and
the scores are the sum over the groups. The output is in registers, two tiles of entries and what of the query is not
in registers are in shared memory: the next tile comes while this one is worked on.
"""

try:  # within a try block, so that transformers does not ask the user of a checkpoint to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from .latent_kernels import visible_scores

if triton is not None:

    @triton.jit
    def _tile(base, tokens, ok, columns, stride, WIDTH: tl.constexpr, SIZE: tl.constexpr):
        """Rows in groups of columns, [groups, rows, columns]; SIZE: the end of the columns, padding included."""
        inside = ok[None, :, None]
        if SIZE > WIDTH:
            inside = inside & (columns < WIDTH)[:, None, :]
        return tl.load(base + (tokens * stride)[None, :, None] + columns[:, None, :], mask=inside, other=0.0)

    @triton.jit
    def _store(at, numbers, ok, columns, RANK: tl.constexpr):
        """The inverse of `_tile`, of the columns below RANK."""
        tl.store(at + columns[:, None, :], numbers, mask=ok[None, :, None] & (columns < RANK)[:, None, :])

    @triton.jit
    def _to_registers(q, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):
        """The same numbers, as the outcome of a product: such stay in registers, where a load would be kept in shared
        memory and read again for every tile. Exact: one times each number."""
        i = tl.arange(0, BLOCK_M)
        one = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(q.dtype)
        one = tl.broadcast_to(one[None, :, :], [GROUPS, BLOCK_M, BLOCK_M])
        return tl.dot(one, q, input_precision=PRECISION).to(q.dtype)

    @triton.jit(do_not_specialize=["num_rows", "num_queries", "num_tokens", "num_splits"])
    def attend_split_wide(
        query, entries, mask, length, partial, log_sums, scaling, num_rows, num_queries, num_tokens, num_splits,
        stride_qb, stride_qm, stride_eb, stride_mb, stride_mt, stride_ms,
        stride_es: tl.constexpr, ALIGN: tl.constexpr,
        RANK: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, ONE_QUERY: tl.constexpr,
        HAS_LENGTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
        BLOCK_REST: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """First stage, as `attend_split`. Grid: (row blocks, splits, batch); neighbours read the same entries.

        Columns: GROUPS of BLOCK_C (low), as many again (high), then GROUPS of BLOCK_REST. All are keys; those below
        RANK are values. The low part of the query is in registers (more of it, and they spill). The row stride of the
        entries is a constant, and so are then the addresses within a tile.
        """
        BLOCK_M: tl.constexpr = 16
        HALF: tl.constexpr = GROUPS * BLOCK_C
        END: tl.constexpr = 2 * HALF + GROUPS * BLOCK_REST
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = rows < num_rows
        split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        query += batch * stride_qb
        entries += tl.multiple_of(batch * stride_eb, ALIGN)
        mask += batch * stride_mb

        end = num_tokens
        if HAS_LENGTH:
            end = tl.minimum(tl.load(length), num_tokens).to(tl.int32)
        per_split = tl.cdiv(tl.cdiv(end, num_splits), BLOCK_N) * BLOCK_N
        begin = split * per_split
        stop = tl.minimum(begin + per_split, end)

        dtype: tl.constexpr = query.dtype.element_ty
        groups = tl.arange(0, GROUPS)[:, None]
        low_columns = groups * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        high_columns = HALF + low_columns
        rest_columns = 2 * HALF + groups * BLOCK_REST + tl.arange(0, BLOCK_REST)[None, :]
        q_low = _tile(query, rows, row_ok, low_columns, stride_qm, WIDTH, HALF)
        q_high = _tile(query, rows, row_ok, high_columns, stride_qm, WIDTH, 2 * HALF)
        q_low = _to_registers(q_low, GROUPS, BLOCK_M, PRECISION)
        low_sum = tl.zeros([GROUPS, BLOCK_M, BLOCK_C], tl.float32)
        high_sum = tl.zeros([GROUPS, BLOCK_M, BLOCK_C], tl.float32)
        if WIDTH > 2 * HALF:
            q_rest = _tile(query, rows, row_ok, rest_columns, stride_qm, WIDTH, END)
            if RANK > 2 * HALF:
                rest_sum = tl.zeros([GROUPS, BLOCK_M, BLOCK_REST], tl.float32)

        stride = tl.full([], stride_es, tl.int64)
        # A maximum and a sum for each place in a tile: with one a row, Triton would carry them in several layouts.
        top = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        near = tl.arange(0, BLOCK_N)
        # The mask of a tile is loaded a tile ahead: also because Triton would shuffle weights that depend on bytes.
        if MASK > 0:
            mask_rows = row_ok[:, None]
            if ONE_QUERY:
                mask_at = mask + (near * stride_ms)[None, :]
                mask_rows = tl.full([1, 1], True, tl.int1)
            else:
                mask_at = mask + (rows % num_queries)[:, None] * stride_mt + (near * stride_ms)[None, :]
            next_given = tl.load(mask_at + begin * stride_ms, mask=(begin + near < stop)[None, :] & mask_rows, other=0)
        for start in range(begin, stop, BLOCK_N):
            tokens = start + near
            ok = tokens < stop
            given = 0
            if MASK > 0:
                given = next_given
                ahead = start + BLOCK_N
                next_given = tl.load(
                    mask_at + ahead * stride_ms, mask=(ahead + near < stop)[None, :] & mask_rows, other=0
                )
            tile = entries + tl.multiple_of(start * stride, ALIGN)
            low = _tile(tile, near, ok, low_columns, stride_es, WIDTH, HALF)
            high = _tile(tile, near, ok, high_columns, stride_es, WIDTH, 2 * HALF)
            shares = tl.dot(q_low, tl.permute(low, (0, 2, 1)), input_precision=PRECISION)
            shares = tl.dot(q_high, tl.permute(high, (0, 2, 1)), shares, input_precision=PRECISION)
            if WIDTH > 2 * HALF:
                rest = _tile(tile, near, ok, rest_columns, stride_es, WIDTH, END)
                shares = tl.dot(q_rest, tl.permute(rest, (0, 2, 1)), shares, input_precision=PRECISION)

            # Neighbours first: Triton then gives a thread all shares of a score, and reads the values late. By halves,
            # and with one maximum and sum a row, the kernel took a fifth longer (docs/dev/performance.md).
            shares = tl.permute(tl.reshape(shares, [GROUPS // 2, 2, BLOCK_M, BLOCK_N]), (0, 2, 3, 1))
            one, two = tl.split(shares)
            scores = tl.sum(one + two, 0)
            scores = visible_scores(scores, given, tokens, ok, rows, row_ok, end, num_queries, scaling, MASK)
            new_top = tl.maximum(top, tl.max(scores, 1)[:, None])
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no difference of infinities
            weights = tl.exp2(scores - shift)
            fade = tl.exp2(top - shift)  # the same in all places of a row
            total = total * fade + weights
            top = new_top
            shared = tl.broadcast_to(weights.to(dtype)[None, :, :], [GROUPS, BLOCK_M, BLOCK_N])
            factor = tl.max(fade, 1)[None, :, None]
            low_sum *= factor
            high_sum *= factor
            if RANK > 2 * HALF:
                rest_sum *= factor
            low_sum = tl.dot(shared, low, low_sum, input_precision=PRECISION)
            high_sum = tl.dot(shared, high, high_sum, input_precision=PRECISION)
            if RANK > 2 * HALF:
                rest_sum = tl.dot(shared, rest, rest_sum, input_precision=PRECISION)

        top, total = tl.max(top, 1), tl.sum(total, 1)
        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[None, :, None]
        place = (batch * num_rows + rows) * num_splits + split
        at = partial + (place * RANK)[None, :, None]
        _store(at, low_sum * share, row_ok, low_columns, RANK)
        _store(at, high_sum * share, row_ok, high_columns, RANK)
        if RANK > 2 * HALF:
            _store(at, rest_sum * share, row_ok, rest_columns, RANK)
        # A row of no sum has the weight 0 in the second stage.
        log_sum = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(log_sums + place, log_sum, mask=row_ok)

else:
    attend_split_wide = None
