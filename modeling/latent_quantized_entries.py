"""The format of quantised cache layers, dynamic or static: the basis in which entries are quantised, and their codes.

With one scale a token, a loud channel takes the resolution of all others. Channels are first scaled so that what an
error in them does to the output and how loud they are weigh the same (see [`importance`]), then mixed by an orthogonal
matrix, after which all are alike. Queries and outputs go through the same matrices instead of the entries.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache

from .latent_attention import first_visible
from .latent_cache import LatentLayer
from .latent_decode import Part
from .latent_quantization import CODE_BITS, dequantize, pack, quantize, random_rotation, unpack

# Tokens whose mean is taken off the rotary keys: the newest when quantisation begins, as left padding is the oldest.
# A mean of few tokens is a bad one.
MEAN_TOKENS = 128
# Numbers quantised at once: a long prompt takes a few buffers of 64 MB, whatever its length.
MAX_NUMBERS = 2**24


def swap_first(x: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy [B, ...] of x [B or 1, ...] in which each row's element at `positions` [B] of `dim` and that at 0 have
    changed places."""
    x = x.expand(positions.shape[0], *x.shape[1:]).clone()
    first = x.narrow(dim, 0, 1).clone()
    at = positions.view(-1, *[1] * (x.dim() - 1)).expand(first.shape)
    x.narrow(dim, 0, 1).copy_(x.gather(dim, at))
    return x.scatter_(dim, at, first)


class QuantizedEntries(LatentLayer):
    """
    What the dynamic and the static quantised layer share: the basis in which entries are quantised, and the codes.

    Args:
        latent_factors, rope_factors (`torch.Tensor`): From [`importance`], [R] and [n*r].
        form (`str`): One of `CODE_BITS`.
        q_group_size (`int`, *optional*): Columns that share a scale; by default all of the latent do, and all of the
            rotary keys.
        residual_length (`int`): How many recent tokens are in full precision, at most.
        kwargs: Of the layer of transformers that this one is.
    """

    packed = True
    is_new = True  # as far as the host knows: nothing was taken in yet
    # Where each row's text begins, [B]; None where all begin at 0. That entry and the one at 0 change places, so that
    # what stays in full precision is a token that attention rests on, and not padding.
    sinks: torch.Tensor | None = None

    def __init__(
        self,
        latent_factors: torch.Tensor,
        rope_factors: torch.Tensor,
        form: str = "int4",
        q_group_size: int | None = None,
        residual_length: int = 32,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if q_group_size is not None and q_group_size < 1:
            raise ValueError(f"q_group_size must be at least 1, or None for one scale a token, got {q_group_size}.")
        if residual_length < 1:
            raise ValueError(f"residual_length must be at least 1, got {residual_length}.")
        self.form, self.residual_length = form, residual_length
        self.sizes = [len(latent_factors), len(rope_factors)]
        self.group_sizes = [min(q_group_size or size, size) for size in self.sizes]
        self.factors = [latent_factors, rope_factors]
        self.rotations = [random_rotation(size) for size in self.sizes]  # here, as a compiler cannot draw them

    def _make_basis(self, dtype: torch.dtype, device: torch.device) -> None:
        """Matrices [W, W] to the basis of the codes and back, of a block for latents and one for rotary keys: a single
        product is faster than one of each."""
        rotations = [rotation.to(device) for rotation in self.rotations]
        factors = torch.cat([part.to(device) for part in self.factors])
        rotation = torch.block_diag(*rotations)
        self.to_rotated = (factors[:, None] * rotation).to(dtype)
        self.from_rotated = (rotation.T / factors).to(dtype)

    def place_sinks(self, cache: Cache, attention_mask: Any, entries: torch.Tensor) -> None:
        """Learn from a prompt's mask where its texts begin, before its entries [B, 1, T, W] are taken in. The first
        layer asks, which costs a wait for the device; the others do as it does. Of a prompt that comes in chunks it is
        the first one's mask: a row that is nothing but padding there keeps what is at 0."""
        if not self.is_new:
            return
        first = cache.layers[0]
        if self is first or not hasattr(first, "sinks"):
            sinks = first_visible(attention_mask, entries.shape[2])
            self.sinks = None if sinks is None else sinks.expand(entries.shape[0])
        else:
            self.sinks = None if first.sinks is None else first.sinks.to(entries.device)

    def change_places(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """x [B or 1, ...], of which `dim` counts tokens, with the first of each text and the one at 0 exchanged."""
        return x if self.sinks is None else swap_first(x, self.sinks, dim)

    def text_mean(self, entries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Mean [B, 1, width] of entries [B, N, width] of these positions [N], in fp32, padding and each text's first
        not counted."""
        begins = 0 if self.sinks is None else self.sinks[:, None]
        counted = (positions > begins).float().view(-1, len(positions), 1)  # [B or 1, N, 1]
        return (entries.float() * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)

    def rotate(self, entries: torch.Tensor) -> torch.Tensor:
        """Entries in the basis in which they are quantised; latents and rotary keys each by themselves."""
        return entries @ self.to_rotated

    def unrotate(self, entries: torch.Tensor) -> torch.Tensor:
        """The inverse of [`rotate`]."""
        return entries @ self.from_rotated

    def to_basis(self, query: torch.Tensor) -> torch.Tensor:
        return query @ self.from_rotated.T

    def from_basis(self, context: torch.Tensor) -> torch.Tensor:
        rank = self.sizes[0]
        return context @ self.from_rotated[:rank, :rank]

    def encode(self, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Words of codes [..., tokens, U] and bytes of scales and zeros [..., tokens, 2 * groups] of rotated entries
        [..., tokens, W]."""
        codes, scales = [], []
        for piece in entries.split(max(1, MAX_NUMBERS * entries.shape[-2] // max(1, entries.numel())), dim=-2):
            sections = zip(piece.split(self.sizes, dim=-1), self.group_sizes, strict=True)
            made = [quantize(section, self.form, group) for section, group in sections]
            codes.append(torch.cat([pack(code, CODE_BITS[self.form]) for code, _ in made], dim=-1))
            scales.append(torch.cat([scale for _, scale in made], dim=-1))
        return torch.cat(codes, dim=-2), torch.cat(scales, dim=-2)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Rotated entries [..., W], fp32, that the results of [`encode`] stand for."""
        nbits = CODE_BITS[self.form]
        widths = [-(-size * nbits // 16) for size in self.sizes]
        counts = [2 * -(-size // group) for size, group in zip(self.sizes, self.group_sizes, strict=True)]
        sections = zip(codes.split(widths, -1), scales.split(counts, -1), self.sizes, self.group_sizes, strict=True)
        numbers = [dequantize(unpack(c, nbits, size), s, self.form, group) for c, s, size, group in sections]
        return torch.cat(numbers, dim=-1)

    def packed_part(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        mask: torch.Tensor | None,
        length: torch.Tensor | None = None,
    ) -> Part:
        """Codes [B, S, U] and scales [B, S, 2 * groups] as [`decode_attention`] takes them."""
        return Part(codes, mask, length, False, self.form, scales, *self.group_sizes)
