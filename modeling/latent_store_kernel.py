"""What a decoding step does to a static quantised cache, in one launch: the oldest token leaves the window, is
quantised and packed, and the new one takes its slot. `LatentStaticQuantizedLayer._store` is the same in torch, for any
number of tokens.
"""

try:  # within a try block, so that transformers does not ask the user of a checkpoint to install it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _exponent(step):
        """As `_exponents` of `latent_quantization`."""
        return tl.minimum(tl.maximum(tl.ceil(8 * tl.log2(tl.maximum(step, 1e-20)) + 160), 0.0), 255.0)

    @triton.jit
    def _round(x):
        """To the nearest integer, ties to even, of numbers below 2^22."""
        return (x + 12582912.0) - 12582912.0

    @triton.jit
    def _e4m3(x):
        """Bits of fp32 numbers of up to 448 in e4m3. After a change of the exponent they are the upper ones of fp32,
        of subnormal numbers too; the lower 20 round them, ties to even."""
        bits = (tl.abs(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)  # 2 ** -120
        return ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) | tl.where(x < 0, 128, 0)

    @triton.jit
    def _store_section(
        x, columns, codes, scales, FORM: tl.constexpr, UNITS: tl.constexpr, SIZE: tl.constexpr,
        BLOCK: tl.constexpr, CLIPPING_1: tl.constexpr, CLIPPING_2: tl.constexpr,
    ):  # fmt: skip
        """Quantise a section, x [parts, words] in fp32, as `quantize` does; write its words, scale and zero."""
        PARTS: tl.constexpr = 4 if FORM == "int4" else 2
        inside = columns < SIZE
        if FORM == "fp8":
            exponent = _exponent(tl.max(tl.max(tl.abs(x), 1), 0) / 448.0)
            zero = exponent * 0.0
            best = _e4m3(tl.minimum(tl.maximum(x / tl.exp2(exponent / 8 - 20), -448.0), 448.0))
        else:
            LEVELS: tl.constexpr = 15.0 if FORM == "int4" else 255.0
            low = tl.minimum(tl.min(tl.min(x, 1), 0), 0.0)
            high = tl.maximum(tl.max(tl.max(x, 1), 0), 0.0)
            exponent = low * 0.0
            zero = low * 0.0
            least = low * 0.0 + float("inf")
            best = tl.zeros_like(x)
            for attempt in tl.static_range(3 if FORM == "int4" else 1):
                share = 1.0 if attempt == 0 else (CLIPPING_1 if attempt == 1 else CLIPPING_2)
                exponent_now = _exponent((high - low) * (share / LEVELS))
                scale = tl.exp2(exponent_now / 8 - 20)
                zero_now = tl.minimum(tl.maximum(_round(-low / scale * (share * 255.0 / LEVELS)), 0.0), 255.0)
                shifted = zero_now * (LEVELS / 255.0)
                now = tl.minimum(tl.maximum(_round(tl.minimum(x / scale + shifted, 1e6)), 0.0), LEVELS)
                wrong = tl.where(inside, (now - shifted) * scale - x, 0.0)
                error = tl.sum(tl.sum(wrong * wrong, 1), 0)
                better = error < least
                least = tl.where(better, error, least)
                exponent = tl.where(better, exponent_now, exponent)
                zero = tl.where(better, zero_now, zero)
                best = tl.where(better, now, best)
            best = best.to(tl.int32)
        best = tl.where(inside, best, 0)
        bits: tl.constexpr = 16 // PARTS
        word = tl.sum(best << (bits * tl.arange(0, PARTS))[:, None], 0)
        words = tl.arange(0, BLOCK)
        tl.store(codes + words, word.to(tl.int16), mask=words < UNITS)
        tl.store(scales, exponent.to(tl.uint8))
        tl.store(scales + 1, zero.to(tl.uint8))

    @triton.jit(do_not_specialize=["size", "num_codes"])
    def store_entry(
        entries, window, mean, codes, scales, length, size, num_codes, stride_en, stride_wb, stride_ws, stride_mb,
        stride_cb, stride_cs, stride_sb, stride_ss,
        RANK: tl.constexpr, ROPE: tl.constexpr, FORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_ROPE: tl.constexpr,
        CLIPPING_1: tl.constexpr, CLIPPING_2: tl.constexpr,
    ):  # fmt: skip
        """Grid: sequences. `length` counts the tokens before this one; the ring has `size` slots."""
        PARTS: tl.constexpr = 4 if FORM == "int4" else 2
        UNITS: tl.constexpr = (RANK + PARTS - 1) // PARTS
        ROPE_UNITS: tl.constexpr = (ROPE + PARTS - 1) // PARTS
        batch = tl.program_id(0).to(tl.int64)
        entries += batch * stride_en
        window += batch * stride_wb
        mean += batch * stride_mb
        count = tl.load(length).to(tl.int32)
        slot = tl.where(count == 0, 0, 1 + (count + size - 1) % size)
        part = tl.arange(0, PARTS)[:, None]
        columns = part * UNITS + tl.arange(0, BLOCK_R)[None, :]
        columns = tl.where(tl.arange(0, BLOCK_R)[None, :] < UNITS, columns, RANK)
        rope_columns = part * ROPE_UNITS + tl.arange(0, BLOCK_ROPE)[None, :]
        rope_columns = tl.where(tl.arange(0, BLOCK_ROPE)[None, :] < ROPE_UNITS, rope_columns, ROPE)
        inside = columns < RANK
        rope_inside = rope_columns < ROPE

        if count == size + 1:
            # The first token leaves: from now on, the mean of those in the ring and of the new one is taken off.
            summed = tl.load(entries + RANK + rope_columns, mask=rope_inside, other=0.0).to(tl.float32)
            for i in range(1, size + 1):
                summed += tl.load(window + i * stride_ws + RANK + rope_columns, mask=rope_inside, other=0.0).to(
                    tl.float32
                )
            average = (summed / (size + 1)).to(mean.dtype.element_ty)
            tl.store(mean + rope_columns, average, mask=rope_inside)
            for i in range(0, size + 1):
                at = window + i * stride_ws + RANK + rope_columns
                x = tl.load(at, mask=rope_inside, other=0.0).to(tl.float32) - average.to(tl.float32)
                tl.store(at, x.to(mean.dtype.element_ty), mask=rope_inside)
            tl.debug_barrier()

        at = window + slot * stride_ws
        if count > size:
            place = tl.minimum(count - size - 1, num_codes - 1).to(tl.int64)
            codes += batch * stride_cb + place * stride_cs
            scales += batch * stride_sb + place * stride_ss
            x = tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
            _store_section(x, columns, codes, scales, FORM, UNITS, RANK, BLOCK_R, CLIPPING_1, CLIPPING_2)
            x = tl.load(at + RANK + rope_columns, mask=rope_inside, other=0.0).to(tl.float32)
            _store_section(
                x, rope_columns, codes + UNITS, scales + 2, FORM, ROPE_UNITS, ROPE, BLOCK_ROPE, CLIPPING_1,
                CLIPPING_2,
            )  # fmt: skip
        tl.store(at + columns, tl.load(entries + columns, mask=inside, other=0.0), mask=inside)
        taken = tl.load(mean + rope_columns, mask=rope_inside, other=0.0).to(tl.float32)
        x = tl.load(entries + RANK + rope_columns, mask=rope_inside, other=0.0).to(tl.float32) - taken
        tl.store(at + RANK + rope_columns, x.to(mean.dtype.element_ty), mask=rope_inside)

else:
    store_entry = None
