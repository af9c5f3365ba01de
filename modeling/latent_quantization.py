"""Quantisation of cache entries in 8 or 4 bits, as pure functions of tensors."""

import functools

import torch

# Formats, and the bits of a code: integers with a scale and a zero, or floating point (e4m3) with a scale.
CODE_BITS = {"int4": 4, "int8": 8, "fp8": 8}
FP8_MAX = 448.0
# Ranges tried for a group in 4 bits, as shares of its own: to clip a little often costs less than coarser steps.
CLIPPING = (1.0, 0.93, 0.86)


@functools.lru_cache(maxsize=8)
def random_rotation(size: int) -> torch.Tensor:
    """A fixed orthogonal matrix, [size, size], fp32 on the CPU."""
    gaussian = torch.randn(
        size, size, generator=torch.Generator().manual_seed(size), device="cpu", dtype=torch.float32
    )
    return torch.linalg.qr(gaussian)[0]


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """
    What an fp8 cache of an engine (e4m3, a scale of 1: vLLM's `--kv-cache-dtype fp8`) gives back for x. The gradient
    passes as if nothing had been rounded (straight-through, arXiv 1308.3432).

    In arithmetic, as Triton knows e4m3 on GPUs from Ada on only: three bits of mantissa, and steps of 2**-9 below
    2**-6.
    """
    size = x.detach().float().clamp(-FP8_MAX, FP8_MAX)
    step = torch.exp2(size.abs().log2().floor().clamp(min=-6) - 3)
    return ((size / step).round() * step).to(x.dtype) + (x - x.detach())


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Codes [..., C], uint8 below 2**nbits, to words of 16 bits [..., U], U = ceil(C * nbits / 16): word j holds, from
    its low bits up, the codes of columns j, j + U, j + 2 U, ..."""
    num_parts = 16 // nbits
    units = -(-codes.shape[-1] // num_parts)
    padded = torch.nn.functional.pad(codes, (0, units * num_parts - codes.shape[-1])).to(torch.int32)
    parts = padded.unflatten(-1, (num_parts, units)).unbind(-2)
    words = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        words = words | (part << (nbits * index))
    return words.to(torch.int16)


def unpack(packed: torch.Tensor, nbits: int, columns: int) -> torch.Tensor:
    """The inverse of [`pack`]: codes [..., columns], uint8."""
    parts = [(packed >> (nbits * index)) & (2**nbits - 1) for index in range(16 // nbits)]
    return torch.cat(parts, dim=-1)[..., :columns].to(torch.uint8)


def quantize(x: torch.Tensor, form: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Codes with a scale and a zero for `group_size` consecutive columns. Of "int4" and "int8", with L = 2**nbits - 1,
    code c means (c - zero * L / 255) * 2 ** (scale / 8 - 20); of "fp8" it is the bits of a number in e4m3, which is to
    be multiplied by that power, and the zero is 0. A byte each is enough, as codes are made with the rounded ones.

    Args:
        x (`torch.Tensor`): [..., C]; the last group is smaller if `group_size` does not divide C.
        form (`str`): One of `CODE_BITS`.

    Returns:
        Codes [..., C] and scales and zeros [..., 2 * ceil(C / group_size)], scale before zero; all uint8.
    """
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    if form == "fp8":
        exponents = _exponents(groups.abs().amax(-1, keepdim=True) / FP8_MAX)
        zeros = torch.zeros_like(exponents)
        numbers = (groups / torch.exp2(exponents / 8 - 20)).clamp(-FP8_MAX, FP8_MAX)
        codes = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes, exponents, zeros = quantize_integers(groups, CODE_BITS[form])
    codes = codes.flatten(-2)[..., : x.shape[-1]].to(torch.uint8)
    return codes, torch.cat((exponents, zeros), dim=-1).flatten(-2).to(torch.uint8)


def quantize_integers(groups: torch.Tensor, nbits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of groups [..., groups, group_size], and their exponents and zeros [..., groups, 1], still as fp32."""
    levels = 2**nbits - 1
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best: list[torch.Tensor] = []  # codes, exponents, zeros and errors
    for share in CLIPPING if nbits < 8 else CLIPPING[:1]:
        exponents = _exponents((high - low) * (share / levels))
        scales = torch.exp2(exponents / 8 - 20)
        zeros = (-low / scales * (share * 255 / levels)).round().clamp(0, 255)
        codes = (groups / scales + zeros * (levels / 255)).round().clamp(0, levels)
        errors = ((codes - zeros * (levels / 255)) * scales - groups).square().sum(-1, keepdim=True)
        made = [codes, exponents, zeros, errors]
        best = [torch.where(errors < best[3], new, old) for new, old in zip(made, best, strict=True)] if best else made
    codes, exponents, zeros, _ = best
    return codes, exponents, zeros


def _exponents(steps: torch.Tensor) -> torch.Tensor:
    """Bytes, as fp32, of the smallest powers of two, in eighths of an octave, that are no smaller than the steps."""
    return (8 * steps.clamp(min=1e-20).log2() + 160).ceil().clamp(0, 255)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, form: str, group_size: int) -> torch.Tensor:
    """Numbers [..., C], fp32, that the two results of [`quantize`] stand for."""
    exponents, zeros = scales.float().unflatten(-1, (-1, 2)).repeat_interleave(group_size, dim=-2).unbind(-1)
    columns = codes.shape[-1]
    if form == "fp8":
        shifted = codes.view(torch.float8_e4m3fn).float()
    else:
        shifted = codes.float() - zeros[..., :columns] * ((2 ** CODE_BITS[form] - 1) / 255)
    return shifted * torch.exp2(exponents[..., :columns] / 8 - 20)


def importance(readers: torch.Tensor, makers: torch.Tensor) -> torch.Tensor:
    """
    Factors for channels [C] from the norms of the weights that read them and of those that make them; their geometric
    mean is 1.

    With one step for all channels, an error of the output is the sum of (reader / factor)^2, and the step grows with
    the sum of (maker * factor)^2: the product is least where factor^2 = reader / maker, and no gauge of the weights
    changes it.
    """
    logs = [norms.clamp(min=norms.max() * 1e-6 + 1e-30).log() for norms in (readers.float(), makers.float())]
    logarithm = (logs[0] - logs[1]) / 2
    return (logarithm - logarithm.mean()).exp()


def pair_norms(squares: torch.Tensor) -> torch.Tensor:
    """Norms [n * r] of rotary dims from their squares [n, r]: the two dims of a pair share one, as rotation mixes
    them."""
    pairs = squares.unflatten(1, (2, -1)).sum(1, keepdim=True).sqrt()  # [n, 1, r/2]
    return pairs.expand(-1, 2, -1).flatten()
