"""Latents in 8 or 4 bits: the cache behind `generate(..., cache_implementation="quantized")`.

What is quantised is the entry (latent and rotary keys) of a token, never an expanded key or value.

- Backends "latent" (default, 4 or 8 bits) and "fp8" (e4m3): ours. Entries are rotated and quantised token by token, so
  that a token is quantised once and never touched again; codes and scales lie in two buffers that the decode kernel
  reads as they are. `latent_static_quantized_cache.py` has the same in memory of a fixed size, for compiled steps.
- Backends "quanto" and "hqq": transformers' own, applied to the same entries. They quantise the whole history anew
  whenever their window is full.

The first token of a text, on which attention rests wherever it has nothing to look at, stays in full precision (behind
padding on the left, too), as does a window of recent tokens. The codes are told of in `latent_quantized_entries.py`.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, DynamicLayer, HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from .latent_cache import GrowingBuffer, LatentLayer, tensor_bytes
from .latent_decode import Part
from .latent_quantized_entries import MEAN_TOKENS, QuantizedEntries
from .latent_static_quantized_cache import LatentStaticQuantizedLayer

SETTINGS = ("q_group_size", "residual_length")
BACKEND_SETTINGS = (*SETTINGS, "axis_key", "axis_value")  # of "quanto" and "hqq"


class LatentQuantizedLayer(QuantizedEntries, DynamicLayer):
    """
    One layer's entries: the first token and the recent ones in full precision, those between as codes.

    At most `residual_length` recent tokens are in full precision. When there are more, all but half of them are
    quantised, so that decoding does so once in `residual_length / 2` steps. Sequences of up to 128 tokens are not
    quantised. Arguments are those of [`QuantizedEntries`].
    """

    is_croppable = True
    first: torch.Tensor  # rotated entries in full precision, [batch, 1, tokens, W]: the first token,
    recent: torch.Tensor  # and those not yet quantised
    mean: torch.Tensor  # of the rotated entries, [batch, 1, 1, W]; None until something is quantised

    def __init__(self, latent_factors: torch.Tensor, rope_factors: torch.Tensor, **settings):
        super().__init__(latent_factors, rope_factors, **settings)
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.codes, self.scales = GrowingBuffer(), GrowingBuffer()
        self.mean = None  # type: ignore[assignment]
        self.is_new, self.sinks = True, None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._make_basis(self.dtype, self.device)
        self.first = self.recent = key_states[:, :, :0]
        self.is_initialized = True

    def append(self, entries: torch.Tensor) -> None:
        """Take in new entries, [batch, 1, new tokens, W], and quantise what no longer fits the window."""
        if not self.is_initialized:
            self.lazy_initialization(entries, entries)
        rotated = self.rotate(entries.detach())
        if self.is_new:
            self.is_new, rotated = False, self.change_places(rotated, dim=2)
            self.first, rotated = rotated[:, :, :1].clone(), rotated[:, :, 1:]  # a view would hold the whole prompt
        self.recent = torch.cat((self.recent, rotated), dim=2)
        if self.recent.shape[2] > max(self.residual_length, 0 if self.mean is not None else MEAN_TOKENS):
            self._quantize_all_but(self.residual_length // 2)

    def _quantize_all_but(self, num_kept: int) -> None:
        cut = self.recent.shape[2] - num_kept
        leaving, self.recent = self.recent[:, :, :cut], self.recent[:, :, cut:].clone()
        if self.mean is None:
            # Some rotary keys are the same for all tokens but for little: the little is what has to be told apart. It
            # makes no difference to latents, whose mean would have to be given back to every output.
            newest = leaving[:, 0, -MEAN_TOKENS:, self.sizes[0] :]
            positions = torch.arange(cut + 1 - newest.shape[1], cut + 1, device=newest.device)
            mean = self.text_mean(newest, positions).unsqueeze(1)
            self.mean = torch.nn.functional.pad(mean, (self.sizes[0], 0)).to(self.dtype)
        codes, scales = self.encode(leaving - self.mean)
        self.codes.append(codes)
        self.scales.append(scales)

    def parts(self, mask: torch.Tensor | None) -> list[Part]:
        """All without the mean: that adds the same to all scores of a query, which the softmax does not feel."""
        window = torch.cat((self.first, self.recent), dim=2)
        mask = None if mask is None else self.change_places(mask, dim=-1)
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
            self.packed_part(codes, scales, packed_mask),
            Part((window - self.mean).squeeze(1), window_mask),
        ]

    def dequantized(self) -> torch.Tensor:
        """All entries as they are remembered, [batch, 1, tokens, W]."""
        pieces = [self.first, self.recent]
        if self.codes.length > 0:
            pieces.insert(1, self.decode(self.codes.view(), self.scales.view()).to(self.dtype) + self.mean)
        return self.unrotate(self.change_places(torch.cat(pieces, dim=2), dim=2))

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
            self.sinks = None if self.sinks is None else change(self.sinks)
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
        if keep == 0:
            return self._clear()
        self.first = self.first[:, :, :keep]
        if self.sinks is not None:  # of a row whose text is forgotten only padding is left
            self.sinks = self.sinks.where(self.sinks < keep, 0)
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
            self.keys = entries.new_empty((*entries.shape[:2], 0, entries.shape[3]))
            self._quantized_keys = None
        self.cumulative_length += entries.shape[-2]
        self.keys = torch.cat([self.keys, entries], dim=-2)
        if self.keys.shape[-2] >= self.residual_length:
            history = self.dequantized()
            self.keys = history.new_empty((*history.shape[:2], 0, history.shape[3]))  # a view would hold the history
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


def quantized_cache(
    model, backend: str = "latent", nbits: int | None = None, max_cache_len: int | None = None, **settings
) -> Cache:
    """
    A quantised cache for `model`, as `generate(cache_implementation="quantized", cache_config=...)` builds it, or with
    "static" for the implementation.

    Args:
        model (`MLALlamaForCausalLM` or `MLALlamaModel`): Its weights tell how much each channel of an entry matters.
        backend (`str`): "latent" (ours, 4 or 8 bits), "fp8" (ours, e4m3), "quanto" or "hqq" (transformers' layers; the
            packages must be installed).
        nbits (`int`, *optional*): 4, the default of "latent", or 8; "quanto" and "hqq" have others.
        max_cache_len (`int`, *optional*): Tokens of a static cache, which "latent" and "fp8" can be.
        settings: `q_group_size` and `residual_length` of [`QuantizedEntries`], or the arguments of transformers'
            layers.

    Raises:
        ValueError: If the model has no latents, or a setting is unknown or out of range.
    """
    attentions = [module for module in model.modules() if hasattr(module, "channel_factors")]  # adapters wrap models
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no latents to quantise: convert the model first.")
    known = SETTINGS if backend in ("latent", "fp8") else BACKEND_SETTINGS
    if unknown := sorted(set(settings) - set(known)):  # transformers' layers swallow what they do not know
        names = ", ".join(("backend", "nbits", *known))
        raise ValueError(f"There is no setting {', '.join(unknown)} of a quantised cache; there are {names}.")
    if backend in ("latent", "fp8"):
        if backend == "fp8" and nbits not in (None, 8):
            raise ValueError(f"The backend 'fp8' has 8 bits, got nbits={nbits!r}; the backend 'latent' has 4 or 8.")
        if backend == "latent" and nbits not in (None, 4, 8):
            raise ValueError(f"nbits must be 4 or 8 for the backend 'latent', got {nbits!r}.")
        settings["form"] = "fp8" if backend == "fp8" else f"int{nbits or 4}"
        layer_class: Callable[..., QuantizedEntries] = LatentQuantizedLayer
        if max_cache_len is not None:
            layer_class, settings["max_cache_len"] = LatentStaticQuantizedLayer, max_cache_len
        factors = [attention.channel_factors(model.dtype) for attention in attentions]
        return Cache(layers=[layer_class(*each, **settings) for each in factors])
    if backend not in ("quanto", "hqq"):
        raise ValueError(
            f"The backend of a quantised cache must be 'latent', 'fp8', 'quanto' or 'hqq', got {backend!r}."
        )
    if max_cache_len is not None:
        raise ValueError(
            f"The backend {backend!r} cannot be static: use 'latent' or 'fp8', or 'quantized' for the cache."
        )
    if nbits is not None:
        settings["nbits"] = nbits
    backend_class = LatentQuantoLayer if backend == "quanto" else LatentHQQLayer
    return Cache(layers=[backend_class(**settings) for _ in attentions])


def cache_for_generation(model, generation_config, batch_size: int, max_cache_length: int) -> Cache | None:
    """The quantised cache that `generate` is asked for, if it is: `cache_implementation="quantized"`, or "static" with
    a `cache_config`."""
    implementation, settings = generation_config.cache_implementation, dict(generation_config.cache_config or {})
    if implementation != "static":
        return quantized_cache(model, **settings) if implementation == "quantized" else None
    if not settings:
        return None
    # No smaller than the last one, as transformers' own: a compiled step holds for caches of one size.
    lengths = getattr(generation_config, "max_cache_len", None), getattr(model, "_previous_max_cache_length", None)
    length = model._previous_max_cache_length = max(max_cache_length, *(length or 0 for length in lengths))
    cache = quantized_cache(model, max_cache_len=length, **settings)
    if generation_config.prefill_chunk_size is not None:
        # On a GPU, chunks of a prompt go through a compiled model, which is no place to make the memory in.
        rows = max(generation_config.num_beams, generation_config.num_return_sequences) * batch_size
        cache.early_initialization(rows, 1, model.config.latent_cache_dim, model.dtype, model.device)
    return cache
