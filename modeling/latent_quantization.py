"""Quantisation of cache entries in 8 or 4 bits, as pure functions of tensors."""

import functools

import torch

# Measured on SmolLM2-135M-Instruct at -68.75 %: the best power lies between 0.5 (noise spread evenly over the weights)
# and 1.0 (docs/dev/performance.md).
IMPORTANCE_POWER = 0.7
# Ranges tried for a group in 4 bits, as shares of its own: to clip a little often costs less than coarser steps.
CLIPPING = (1.0, 0.93, 0.86)


@functools.lru_cache(maxsize=8)
def random_rotation(size: int) -> torch.Tensor:
    """A fixed orthogonal matrix, [size, size], fp32 on the CPU."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(size), device="cpu")
    return torch.linalg.qr(gaussian)[0]


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Codes [..., C], uint8 below 2**nbits, to bytes: with 4 bits [..., ceil(C/2)], of which byte j holds column j in
    its low half and column j + ceil(C/2) in its high half."""
    if nbits == 8:
        return codes
    half = (codes.shape[-1] + 1) // 2
    low, high = codes[..., :half], torch.nn.functional.pad(codes[..., half:], (0, codes.shape[-1] % 2))
    return low | (high << 4)


def unpack(packed: torch.Tensor, nbits: int, columns: int) -> torch.Tensor:
    """The inverse of [`pack`]: codes [..., columns], uint8."""
    return packed if nbits == 8 else torch.cat((packed & 15, packed >> 4), dim=-1)[..., :columns]


def quantize(x: torch.Tensor, nbits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Codes with a scale and a zero for `group_size` consecutive columns. With L = 2**nbits - 1, code c means
    (c - zero * L / 255) * 2 ** (scale / 8 - 20): a byte each is enough, as codes are made with the rounded ones.

    Args:
        x (`torch.Tensor`): [..., C]; the last group is smaller if `group_size` does not divide C.

    Returns:
        Codes [..., C] and scales and zeros [..., 2 * ceil(C / group_size)], scale before zero; all uint8.
    """
    levels = 2**nbits - 1
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best: list[torch.Tensor] = []  # codes, exponents, zeros and errors
    for share in CLIPPING if nbits < 8 else CLIPPING[:1]:
        exponents = (8 * ((high - low) * (share / levels)).clamp(min=1e-20).log2() + 160).ceil().clamp(0, 255)
        scales = torch.exp2(exponents / 8 - 20)
        zeros = (-low / scales * (share * 255 / levels)).round().clamp(0, 255)
        codes = (groups / scales + zeros * (levels / 255)).round().clamp(0, levels)
        errors = ((codes - zeros * (levels / 255)) * scales - groups).square().sum(-1, keepdim=True)
        made = [codes, exponents, zeros, errors]
        best = [torch.where(errors < best[3], new, old) for new, old in zip(made, best, strict=True)] if best else made
    codes, exponents, zeros, _ = best
    codes = codes.flatten(-2)[..., : x.shape[-1]].to(torch.uint8)
    return codes, torch.cat((exponents, zeros), dim=-1).flatten(-2).to(torch.uint8)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, nbits: int, group_size: int) -> torch.Tensor:
    """Numbers [..., C], fp32, that the two results of [`quantize`] stand for."""
    exponents, zeros = scales.float().unflatten(-1, (-1, 2)).repeat_interleave(group_size, dim=-2).unbind(-1)
    columns = codes.shape[-1]
    shifted = codes.float() - zeros[..., :columns] * ((2**nbits - 1) / 255)
    return shifted * torch.exp2(exponents[..., :columns] / 8 - 20)


def importance(weight_norms: torch.Tensor) -> torch.Tensor:
    """Factors for channels [C] from the norms of the weights that read them; their geometric mean is 1."""
    logarithm = weight_norms.float().clamp(min=weight_norms.max().item() * 1e-6 + 1e-30).log() * IMPORTANCE_POWER
    return (logarithm - logarithm.mean()).exp()
