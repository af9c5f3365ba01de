"""Latents in 8 or 4 bits: the cache behind `generate(..., cache_implementation="quantized")`.

What is quantised is the entry (latent and rotary keys) of a token, never an expanded key or value.

- Backend "latent" (default): entries are rotated and quantised token by token, so that a token is quantised once and
  never touched again; codes and scales lie in two buffers that the decode kernel reads as they are.
- Backends "quanto" and "hqq": transformers' own, applied to the same entries. They quantise the whole history anew
  whenever their window is full.

Why a rotation: with one scale a token, a loud channel takes the resolution of all others. Channels are first
scaled to what an error in them does to the output (a power of the norm of the weights that read them), then mixed by
an orthogonal matrix, after which all are alike. The first token, on which attention rests wherever it has nothing to
look at, stays in full precision, as does a window of recent tokens.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer, HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from .latent_cache import GrowingBuffer, LatentLayer, tensor_bytes
from .latent_decode import Part
from .latent_quantization import dequantize, pack, quantize, random_rotation, unpack

# Tokens whose mean is taken off the rotary keys: the newest when quantisation begins, as left padding is the oldest.
# A mean of few tokens is a bad one: nothing is quantised before there are so many.
MEAN_TOKENS = 128
# Numbers quantised at once: a long prompt takes a few buffers of 64 MB, whatever its length.
MAX_NUMBERS = 2**24


class LatentQuantizedLayer(LatentLayer, DynamicLayer):
    """
    One layer's entries: the first token and the recent ones in full precision, those between in `nbits`.

    Args:
        latent_factors, rope_factors (`torch.Tensor`): From [`importance`], [R] and [n*r].
        nbits (`int`): 4 or 8.
        q_group_size (`int`, *optional*): Columns that share a scale; by default all of the latent do, and all of the
            rotary keys.
        residual_length (`int`): At most that many recent tokens are in full precision. When there are more, all but
            half of them are quantised, so that decoding does so once in `residual_length / 2` steps. Sequences of up
            to 128 tokens are not quantised.
    """

    is_croppable = True
    packed = True
    first: torch.Tensor  # rotated entries in full precision, [batch, 1, tokens, W]: the first token,
    recent: torch.Tensor  # and those not yet quantised
    mean: torch.Tensor  # of the rotated entries, [batch, 1, 1, W]; None until something is quantised

    def __init__(
        self,
        latent_factors: torch.Tensor,
        rope_factors: torch.Tensor,
        nbits: int = 4,
        q_group_size: int | None = None,
        residual_length: int = 32,
    ):
        super().__init__()
        if nbits not in (4, 8):
            raise ValueError(f"nbits must be 4 or 8 for the backend 'latent', got {nbits}.")
        if q_group_size is not None and q_group_size < 1:
            raise ValueError(f"q_group_size must be at least 1, or None for one scale a token, got {q_group_size}.")
        if residual_length < 1:
            raise ValueError(f"residual_length must be at least 1, got {residual_length}.")
        self.nbits, self.residual_length = nbits, residual_length
        self.sizes = [len(latent_factors), len(rope_factors)]
        self.group_sizes = [min(q_group_size or size, size) for size in self.sizes]
        self.factors = [latent_factors, rope_factors]
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.codes, self.scales = GrowingBuffer(), GrowingBuffer()
        self.mean = None  # type: ignore[assignment]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        to, back = [], []
        for factors in self.factors:
            factors, rotation = factors.to(self.device), random_rotation(len(factors)).to(self.device)
            to.append((factors[:, None] * rotation).to(self.dtype))
            back.append((rotation.T / factors).to(self.dtype))
        self.to_rotated, self.from_rotated = to, back
        self.first = self.recent = key_states[:, :, :0]
        self.is_initialized = True

    def rotate(self, entries: torch.Tensor) -> torch.Tensor:
        """Entries in the basis in which they are quantised; latents and rotary keys each by themselves."""
        parts = entries.split(self.sizes, dim=-1)
        return torch.cat([part @ matrix for part, matrix in zip(parts, self.to_rotated, strict=True)], dim=-1)

    def unrotate(self, entries: torch.Tensor) -> torch.Tensor:
        """The inverse of [`rotate`]."""
        parts = entries.split(self.sizes, dim=-1)
        return torch.cat([part @ matrix for part, matrix in zip(parts, self.from_rotated, strict=True)], dim=-1)

    def append(self, entries: torch.Tensor) -> None:
        """Take in new entries, [batch, 1, new tokens, W], and quantise what no longer fits the window."""
        if not self.is_initialized:
            self.lazy_initialization(entries, entries)
        rotated = self.rotate(entries.detach())
        if self.first.shape[2] == 0:
            self.first, rotated = rotated[:, :, :1], rotated[:, :, 1:]
        self.recent = torch.cat((self.recent, rotated), dim=2)
        if self.recent.shape[2] > max(self.residual_length, 0 if self.mean is not None else MEAN_TOKENS):
            self._quantize_all_but(self.residual_length // 2)

    def _quantize_all_but(self, num_kept: int) -> None:
        cut = self.recent.shape[2] - num_kept
        leaving, self.recent = self.recent[:, :, :cut], self.recent[:, :, cut:].clone()
        if self.mean is None:
            # Some rotary keys are the same for all tokens but for little: the little is what has to be told apart. It
            # makes no difference to latents, whose mean would have to be given back to every output.
            mean = leaving[:, :, -MEAN_TOKENS:].float().mean(dim=2, keepdim=True)
            self.mean = torch.nn.functional.pad(mean[..., self.sizes[0] :], (self.sizes[0], 0)).to(self.dtype)
        codes, scales = [], []
        for piece in leaving.split(max(1, MAX_NUMBERS // (leaving.shape[0] * leaving.shape[3])), dim=2):
            parts = (piece - self.mean).split(self.sizes, dim=-1)
            made = [quantize(part, self.nbits, group) for part, group in zip(parts, self.group_sizes, strict=True)]
            codes.append(torch.cat([pack(code, self.nbits) for code, _ in made], dim=-1))
            scales.append(torch.cat([scale for _, scale in made], dim=-1))
        self.codes.append(torch.cat(codes, dim=2))
        self.scales.append(torch.cat(scales, dim=2))

    def to_basis(self, query: torch.Tensor) -> torch.Tensor:
        parts = query.split(self.sizes, dim=-1)
        matrices = zip(parts, self.from_rotated, strict=True)
        return torch.cat([part @ matrix.T for part, matrix in matrices], dim=-1)

    def from_basis(self, context: torch.Tensor) -> torch.Tensor:
        return context @ self.from_rotated[0]

    def parts(self, mask: torch.Tensor | None) -> list[Part]:
        """All without the mean: that adds the same to all scores of a query, which the softmax does not feel."""
        window = torch.cat((self.first, self.recent), dim=2)
        cut = 1 + self.codes.length
        if self.codes.length == 0:
            return [Part(window.squeeze(1), mask)]
        if mask is None:
            # Queries behind the packed tokens see all of those; only one may come without a mask, and it sees all.
            packed_mask = window_mask = None
        else:
            packed_mask = mask[..., 1:cut]
            window_mask = torch.cat((mask[..., :1], mask[..., cut : self.get_seq_length()]), dim=-1)
        codes, scales = self.codes.view().squeeze(1), self.scales.view().squeeze(1)
        return [
            Part(codes, packed_mask, None, scales, self.nbits, *self.group_sizes),
            Part((window - self.mean).squeeze(1), window_mask),
        ]

    def dequantized(self) -> torch.Tensor:
        """All entries as they are remembered, [batch, 1, tokens, W]."""
        pieces = [self.first, self.recent]
        if self.codes.length > 0:
            widths = [size if self.nbits == 8 else (size + 1) // 2 for size in self.sizes]
            counts = [2 * -(-size // group) for size, group in zip(self.sizes, self.group_sizes, strict=True)]
            codes, scales = self.codes.view().split(widths, dim=-1), self.scales.view().split(counts, dim=-1)
            numbers = [
                dequantize(unpack(c, self.nbits, size), s, self.nbits, group)
                for c, s, size, group in zip(codes, scales, self.sizes, self.group_sizes, strict=True)
            ]
            pieces.insert(1, torch.cat(numbers, dim=-1).to(self.dtype) + self.mean)
        return self.unrotate(torch.cat(pieces, dim=2))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes as in [`OneBufferLayer.update`]. What is returned holds the new entries as they were given,
        behind the history as it is remembered, so that a prompt attends to itself in full precision."""
        self.append(key_states)
        entries = key_states
        if self.get_seq_length() > key_states.shape[2]:
            history = self.dequantized()[:, :, : -key_states.shape[2]]
            entries = torch.cat((history, key_states), dim=2)
        return entries, entries[..., : self.sizes[0]]

    def get_seq_length(self) -> int:
        return 0 if not self.is_initialized else self.first.shape[2] + self.codes.length + self.recent.shape[2]

    def _change_rows(self, change) -> None:
        if self.is_initialized:
            self.first, self.recent = change(self.first), change(self.recent)
            self.mean = None if self.mean is None else change(self.mean)
            self.codes.change(change)
            self.scales.change(change)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_rows(lambda x: x[indices, ...])

    def offload(self) -> None:
        self._change_rows(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change_rows(lambda x: x.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers' sign)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop wants minus the number of tokens to forget, got {tokens_to_remove}.")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        keep = max(0, self.get_seq_length() + tokens_to_remove)
        self.first = self.first[:, :, :keep]
        self.codes.length = self.scales.length = min(self.codes.length, max(0, keep - 1))
        self.recent = self.recent[:, :, : max(0, keep - 1 - self.codes.length)]

    def reset(self) -> None:
        self._clear()

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, the mean and the tokens in full precision."""
        if not self.is_initialized:
            return 0
        parts = [self.first, self.recent, *([] if self.mean is None else [self.mean])]
        parts += [buffer.view() for buffer in (self.codes, self.scales) if buffer.data is not None]
        return sum(part.numel() * part.element_size() for part in parts)


class LatentBackendLayer(LatentLayer, QuantizedLayer):
    """transformers' quantised layers, given one tensor of entries instead of keys and values."""

    def append(self, entries: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(entries, entries)
            self.keys = entries[:, :, :0]
            self._quantized_keys = None
        self.cumulative_length += entries.shape[-2]
        self.keys = torch.cat([self.keys, entries], dim=-2)
        if self.keys.shape[-2] >= self.residual_length:
            history = self.dequantized()
            self.keys = history[:, :, :0]
            self._quantized_keys = self._quantize(history.contiguous(), axis=self.axis_key)

    def parts(self, mask: torch.Tensor | None) -> list[Part]:
        return [Part(self.dequantized().squeeze(1), mask)]

    def dequantized(self) -> torch.Tensor:
        """All entries as they are remembered, [batch, 1, tokens, W]."""
        if self._quantized_keys is None:
            return self.keys
        return torch.cat([self._dequantize(self._quantized_keys), self.keys], dim=-2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes as in [`OneBufferLayer.update`]. What is returned holds the new entries as they were given, even if
        they are quantised now."""
        entries = key_states
        if self.is_initialized:
            entries = torch.cat([self.dequantized(), key_states], dim=-2)
        self.append(key_states)
        return entries, entries[..., : value_states.shape[-1]]

    def reset(self) -> None:
        self.cumulative_length = 0
        self.is_initialized = False
        self.keys = self.values = self._quantized_keys = None  # type: ignore[assignment]

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "This backend cannot forget tokens (assisted decoding); use cache_config={'backend': 'latent'}."
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise ValueError("This backend cannot reorder beams without loss; use cache_config={'backend': 'latent'}.")

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised tensor with its scales and zeros, and of the window."""
        if not self.is_initialized:
            return 0
        return tensor_bytes(self._quantized_keys) + self.keys.numel() * self.keys.element_size()


class LatentQuantoLayer(LatentBackendLayer, QuantoQuantizedLayer):
    """Entries in optimum-quanto's format."""


class LatentHQQLayer(LatentBackendLayer, HQQQuantizedLayer):
    """Entries in HQQ's format."""


def quantized_cache(model, backend: str = "latent", **settings) -> Cache:
    """
    A quantised cache for `model`, as `generate(cache_implementation="quantized", cache_config=...)` builds it.

    Args:
        model (`MLALlamaForCausalLM` or `MLALlamaModel`): Its weights tell how much each channel of an entry matters.
        backend (`str`): "latent" (ours), "quanto" or "hqq" (transformers' layers; the packages must be installed).
        settings: `nbits`, `q_group_size` and `residual_length` of [`LatentQuantizedLayer`], or the arguments of
            transformers' layers.
    """
    layers = model.base_model.layers
    if backend == "latent":
        factors = [layer.self_attn.channel_factors(model.dtype) for layer in layers]
        return Cache(layers=[LatentQuantizedLayer(*each, **settings) for each in factors])
    if backend not in ("quanto", "hqq"):
        raise ValueError(f"The backend of a quantised cache must be 'latent', 'quanto' or 'hqq', got {backend!r}.")
    layer_class = LatentQuantoLayer if backend == "quanto" else LatentHQQLayer
    return Cache(layers=[layer_class(**settings) for _ in layers])
