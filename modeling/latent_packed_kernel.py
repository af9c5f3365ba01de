"""The Triton kernel behind `decode_attention` for packed entries, which reads codes as they lie.

Words of 16 bits hold 2 or 4 codes of one entry (see `pack`), so that codes are to shared memory, and to the loads that
feed the matrix units, what bf16 numbers are: `raw` [tokens, words] is copied there asynchronously, read as an operand,
and becomes part after part of the columns in registers, on its way to the product. Half of a logical operation makes a
number of a code: its bits are those of a subnormal number in fp16, code * 2^-24, or * 2^-20 where they lie four bits
higher; matrix units take those as they take others. Queries and outputs make up for the powers of two. Scale and zero
of an entry are factors and summands of scores and weights.

The products are transposed, entries by queries: a matrix unit takes 64 rows on one side, of which queries would fill
half or less, and only that side may come from registers. Codes are read once as keys and once, transposed, as values.
"""

try:  # within a try block, so that transformers does not ask the user of a checkpoint to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.constexpr_function
    def _ptx(form, index):
        """What makes two numbers in fp16 of part `index` of two words (of "int4", shifted by 8 for the upper two):
        bits of a code become those of a subnormal number; e4m3 is converted by the hardware."""
        if form == "int4":
            return "and.b32 $0, $1, " + ("0x000F000F;", "0x00F000F0;")[index % 2]
        if form == "int8":
            return ("and.b32 $0, $1, 0x00FF00FF;", "prmt.b32 $0, $1, 0, 0x4341;")[index]
        pick = "prmt.b32 t, $1, 0, " + ("0x4420; ", "0x4431; ")[index]
        return "{ .reg .b32 t; .reg .b16 a, b; " + pick + "mov.b32 {a, b}, t; cvt.rn.f16x2.e4m3x2 $0, a; }"

    @triton.constexpr_function
    def _unit(form, index, small):
        """What a number that `_codes` gives is to be multiplied by, for a code: 1 unless they are subnormal ones."""
        if form == "fp8" or not small:
            return 1.0
        return 2.0**20 if form == "int4" and index % 2 == 1 else 2.0**24

    @triton.constexpr_function
    def _shift(form, index, small):
        """By what queries that meet this part are multiplied, for scores of all parts in the unit of the first."""
        return _unit(form, index, small) / _unit(form, 0, small)

    @triton.jit
    def _codes(
        raw, INDEX: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr, SMALL: tl.constexpr, dtype: tl.constexpr
    ):  # fmt: skip
        """Part INDEX of the codes in words, in units of `_unit`."""
        if PTX:
            if FORM == "int4" and INDEX >= 2:
                raw = tl.inline_asm_elementwise(
                    "shr.b32 $0, $1, 8;", "=r,r", [raw], dtype=tl.int16, is_pure=True, pack=2
                )
            asm: tl.constexpr = _ptx(FORM, INDEX)
            return tl.inline_asm_elementwise(asm, "=r,r", [raw], dtype=tl.float16, is_pure=True, pack=2)
        elif FORM == "int4":
            return (((raw.to(tl.int32) >> (4 * INDEX)) & 15).to(tl.float32) / _unit(FORM, INDEX, SMALL)).to(dtype)
        elif FORM == "int8":
            return (((raw.to(tl.int32) >> (8 * INDEX)) & 255).to(tl.float32) / _unit(FORM, INDEX, SMALL)).to(dtype)
        else:
            byte = (raw.to(tl.int32) >> (8 * INDEX)) & 255
            bits = ((byte & 128) << 8) | ((byte & 127) << 7)  # of a 256th in fp16
            return (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)

    @triton.jit
    def _power(x, PTX: tl.constexpr):
        """2 ** x; what is too small for a normal number may become 0, which spares three instructions."""
        if PTX:
            return tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        return tl.exp2(x)

    @triton.jit
    def _scale_and_zero(exponent, zero, FORM: tl.constexpr):
        """The binary logarithm of a scale, and the zero on the scale of codes, from their bytes."""
        step: tl.constexpr = 15.0 / 255.0 if FORM == "int4" else 1.0
        return exponent.to(tl.float32) * 0.125 - 20.0, zero.to(tl.float32) * step

    @triton.jit
    def _sum_pairs(x, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
        """Sums of tokens eight apart, [BLOCK_N / 16, 8, BLOCK_M]: of those that one thread holds after a product."""
        return tl.sum(tl.reshape(x, [BLOCK_N // 16, 2, 8, BLOCK_M]), 1)

    @triton.jit
    def _numbers(
        raw, scales, rows, ok, words, first_group, INDEX: tl.constexpr, UNITS: tl.constexpr, SIZE: tl.constexpr,
        GROUP: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr, SMALL: tl.constexpr, dtype: tl.constexpr,
    ):  # fmt: skip
        """What a product is given: codes, or, where columns have scales of their own (GROUP > 0), numbers. `rows` and
        `ok` of the tokens and `words` are [tokens, 1] and [1, words], or the other way round."""
        codes = _codes(raw, INDEX, FORM, PTX, SMALL, dtype)
        if GROUP == 0:
            return codes
        columns = INDEX * UNITS + words
        inside = ok & (words < UNITS) & (columns < SIZE)
        at = scales + rows + 2 * (first_group + columns // GROUP)
        exponent, zero = _scale_and_zero(
            tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0), FORM
        )
        numbers = codes.to(tl.float32) * _unit(FORM, INDEX, SMALL)
        if FORM != "fp8":
            numbers -= zero
        return tl.where(inside, numbers * tl.exp2(exponent), 0.0).to(dtype)

    @triton.jit
    def _query(
        query, rows, ok, words, factor, INDEX: tl.constexpr, UNITS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """The query's columns that meet part INDEX of these words, [rows, words], in fp32."""
        columns = INDEX * UNITS + words
        inside = ok[:, None] & ((words < UNITS) & (columns < SIZE))[None, :]
        q = tl.load(query + rows[:, None] + columns[None, :], mask=inside, other=0.0)
        return q.to(tl.float32) * factor[:, None]

    @triton.jit(do_not_specialize=["num_rows", "num_queries", "num_tokens", "first_split", "num_splits"])
    def attend_split_packed(
        query, entries, scales, mask, length, partial, log_sums, scaling, num_rows, num_queries, num_tokens,
        first_split, num_splits, stride_qb, stride_qm, stride_eb, stride_es, stride_sb, stride_ss,
        stride_mb, stride_mt, stride_ms,
        ALIGN: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, GROUP: tl.constexpr, ROPE_GROUP: tl.constexpr,
        FORM: tl.constexpr, MASK: tl.constexpr, ONE_QUERY: tl.constexpr, HAS_LENGTH: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_ROPE: tl.constexpr,
        PTX: tl.constexpr, SMALL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """First stage, as `attend_split`. Grid: (row blocks, splits of this launch, batch).

        A tile is BLOCK_N entries by BLOCK_U words, and there are as many parts of the columns as tiles of words times
        codes in a word. With HALF, products are of fp16 numbers, and queries are brought to a power of two in which
        fp16 holds them. With SMALL, codes become subnormal numbers, which not every matrix unit takes.
        """
        PARTS: tl.constexpr = 4 if FORM == "int4" else 2
        UNITS: tl.constexpr = (RANK + PARTS - 1) // PARTS
        ROPE_UNITS: tl.constexpr = (ROPE + PARTS - 1) // PARTS
        TILES: tl.constexpr = (UNITS + BLOCK_U - 1) // BLOCK_U
        ROPE_FIRST: tl.constexpr = 0 if GROUP == 0 else (RANK + GROUP - 1) // GROUP
        dtype: tl.constexpr = tl.float16 if HALF else query.dtype.element_ty
        ZEROS: tl.constexpr = GROUP == 0 and FORM != "fp8"
        LEFT: tl.constexpr = SMALL and GROUP == 0  # whether units are left in the products
        UNIT: tl.constexpr = _unit(FORM, 0, LEFT)  # of scores, until rows are scaled
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

        words = tl.arange(0, BLOCK_U)
        rope_words = tl.arange(0, BLOCK_ROPE)
        largest = tl.zeros([BLOCK_M, BLOCK_U], tl.float32)
        for first in tl.static_range(0, RANK + ROPE, BLOCK_U):
            row_inside = row_ok[:, None] & (first + words < RANK + ROPE)[None, :]
            q = tl.load(query + query_rows[:, None] + (first + words)[None, :], mask=row_inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(q.to(tl.float32)))
        power = tl.floor(tl.log2(tl.maximum(tl.max(largest, 1), 1e-30)))
        factor = tl.exp2(-power)
        row_scaling = tl.exp2(power) * (scaling * 1.4426950408889634 * UNIT)
        q_sum = tl.zeros([BLOCK_M, BLOCK_U], tl.float32)
        q_rope_sum = tl.zeros([BLOCK_M, BLOCK_ROPE], tl.float32)
        queries, rope_queries, sums = (), (), ()
        for tile in tl.static_range(TILES):
            for part in tl.static_range(PARTS):
                q = _query(query, query_rows, row_ok, tile * BLOCK_U + words, factor, part, UNITS, RANK)
                q_sum += q
                queries += (tl.trans((q * _shift(FORM, part, LEFT)).to(dtype)),)  # type: ignore[assignment]
                sums += (tl.zeros([BLOCK_U, BLOCK_M], tl.float32),)  # type: ignore[assignment]
        for part in tl.static_range(PARTS):
            q = _query(query + RANK, query_rows, row_ok, rope_words, factor, part, ROPE_UNITS, ROPE)
            q_rope_sum += q
            rope_queries += (tl.trans((q * _shift(FORM, part, LEFT)).to(dtype)),)  # type: ignore[assignment]
        q_sum = tl.sum(q_sum, 1) / UNIT
        q_rope_sum = tl.sum(q_rope_sum, 1) / UNIT

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N // 16, 8, BLOCK_M], tl.float32)
        offset = tl.zeros([BLOCK_N // 16, 8, BLOCK_M], tl.float32)
        near = begin + tl.arange(0, BLOCK_N)
        # Masks and scales of a tile are loaded a tile ahead; the codes Triton copies ahead by itself.
        if MASK > 0 and ONE_QUERY:
            next_given = tl.load(mask + near * stride_ms, mask=near < stop, other=0)
        if GROUP == 0:
            next_scale = tl.load(scales + near.to(tl.int64) * stride_ss, mask=near < stop, other=0)
        for start in range(begin, stop, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            ok = tokens < stop
            ahead = tokens + BLOCK_N
            if MASK > 0 and ONE_QUERY:
                given = next_given
                next_given = tl.load(mask + ahead * stride_ms, mask=ahead < stop, other=0)
            elif MASK > 0:
                at = mask + (rows % num_queries)[None, :] * stride_mt + tokens[:, None] * stride_ms
                given = tl.load(at, mask=ok[:, None] & row_ok[None, :], other=0)
            else:
                given = 0
            token_rows = tl.multiple_of(tokens.to(tl.int64) * stride_es, ALIGN)
            scale_rows = tokens.to(tl.int64) * stride_ss

            inside = ok[:, None] & (rope_words < ROPE_UNITS)[None, :]
            raw = tl.load(entries + UNITS + token_rows[:, None] + rope_words[None, :], mask=inside, other=0)
            scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(PARTS):
                numbers = _numbers(
                    raw, scales, scale_rows[:, None], ok[:, None], rope_words[None, :], ROPE_FIRST, part, ROPE_UNITS,
                    ROPE, ROPE_GROUP, FORM, PTX, SMALL, dtype,
                )  # fmt: skip
                scores = tl.dot(numbers, rope_queries[part], scores, input_precision=PRECISION)
            if GROUP == 0:  # a scale and a zero of the latent, and of the rotary keys
                word = next_scale
                next_scale = tl.load(scales + ahead.to(tl.int64) * stride_ss, mask=ahead < stop, other=0)
                exponent, zero = _scale_and_zero(word & 255, (word >> 8) & 255, FORM)
                rope_exponent, rope_zero = _scale_and_zero((word >> 16) & 255, (word >> 24) & 255, FORM)
                ratio = _power(rope_exponent - exponent, PTX)[:, None]
                if ZEROS:
                    scores = (scores - q_rope_sum[None, :] * rope_zero[:, None]) * ratio
                    scores -= q_sum[None, :] * zero[:, None]
                else:
                    scores *= ratio
            for tile in tl.static_range(TILES):
                at = tile * BLOCK_U + words
                inside = ok[:, None] & (at < UNITS)[None, :]
                raw = tl.load(entries + token_rows[:, None] + at[None, :], mask=inside, other=0)
                for part in tl.static_range(PARTS):
                    numbers = _numbers(
                        raw, scales, scale_rows[:, None], ok[:, None], at[None, :], 0, part, UNITS, RANK, GROUP, FORM,
                        PTX, SMALL, dtype,
                    )  # fmt: skip
                    scores = tl.dot(numbers, queries[tile * PARTS + part], scores, input_precision=PRECISION)
            if GROUP == 0:
                scores *= _power(exponent, PTX)[:, None]
            else:
                exponent = tl.zeros([BLOCK_N], tl.float32)
            # The exponent is added to scores: weights times scale are then at most 1, as fp16 likes them.
            if ONE_QUERY:
                bias = exponent
                if MASK == 1:
                    ok = ok & (given != 0)
                elif MASK == 2:
                    bias += given.to(tl.float32) * 1.4426950408889634
                scores = scores * row_scaling[None, :] + tl.where(ok, bias, float("-inf"))[:, None]
            else:
                seen = ok[:, None]
                scores = scores * row_scaling[None, :] + exponent[:, None]
                if MASK == 1:
                    seen = seen & (given != 0)
                elif MASK == 2:
                    scores += given.to(tl.float32) * 1.4426950408889634
                else:  # causal: the queries are the last tokens
                    seen = seen & (tokens[:, None] <= (end - num_queries + rows % num_queries)[None, :])
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no difference of infinities
            weights = _power(scores - shift[None, :], PTX)
            fade = _power(top - shift, PTX)
            top = new_top
            seen_now = weights
            if GROUP == 0:
                seen_now *= _power(-exponent, PTX)[:, None]
            total = total * fade[None, None, :] + _sum_pairs(seen_now, BLOCK_N, BLOCK_M)
            weights = weights.to(dtype)
            if ZEROS:
                zeros_now = weights.to(tl.float32) * zero[:, None]
                offset = offset * fade[None, None, :] + _sum_pairs(zeros_now, BLOCK_N, BLOCK_M)
            added = ()
            for tile in tl.static_range(TILES):
                at = tile * BLOCK_U + words
                inside = (tokens < stop)[None, :] & (at < UNITS)[:, None]
                raw = tl.load(entries + token_rows[None, :] + at[:, None], mask=inside, other=0)
                for part in tl.static_range(PARTS):
                    numbers = _numbers(
                        raw, scales, scale_rows[None, :], (tokens < stop)[None, :], at[:, None], 0, part, UNITS, RANK,
                        GROUP, FORM, PTX, SMALL, dtype,
                    )  # fmt: skip
                    faded = sums[tile * PARTS + part] * fade[None, :]
                    added += (tl.dot(numbers, weights, faded, input_precision=PRECISION),)  # type: ignore[assignment]
            sums = added

        total, offset = tl.sum(tl.sum(total, 0), 0), tl.sum(tl.sum(offset, 0), 0)
        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        place = (batch * num_rows + rows) * num_splits + first_split + split
        for tile in tl.static_range(TILES):
            at = tile * BLOCK_U + words
            for part in tl.static_range(PARTS):
                columns = part * UNITS + at
                inside = ((at < UNITS) & (columns < RANK))[:, None] & row_ok[None, :]
                output = (sums[tile * PARTS + part] * _unit(FORM, part, LEFT) - offset[None, :]) * share[None, :]
                tl.store(partial + place[None, :] * RANK + columns[:, None], output, mask=inside)
        # A row of no sum has the weight 0 in the second stage.
        log_sum = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(log_sums + place, log_sum, mask=row_ok)

else:
    attend_split_packed = None
