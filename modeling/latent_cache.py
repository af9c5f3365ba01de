"""Cache layers that hold latents and rotary keys, and nothing else.

transformers builds `DynamicCache` and `StaticCache` from one layer object per entry of `config.layer_types`. The two
classes below register themselves for the name "latent_attention", so that `generate()` picks them with no argument.

A layer keeps ONE buffer `keys` of shape [batch, 1, tokens, W]: per token an entry of the latent (R numbers) and the
rotary keys (n heads of r dims). `values` is always the view `keys[..., :R]`: absorbed attention is multi-query
attention with the buffer as its keys and the latents as its values, without copying either.
"""

import inspect
from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.utils import is_torchdynamo_compiling

from .latent_config import LATENT_LAYER_TYPE
from .latent_decode import Part

# What transformers calls a cache in arguments: "past_key_values" before 5.24, "cache" since.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# A static cache's tokens are rounded up to a multiple of this: matrix units load 8 numbers of 16 bits at once, and for
# other lengths torch.compile makes a padded copy of the whole cache on every step.
STATIC_ROUNDING = 8


def round_up(tokens: int) -> int:
    """Tokens that a static cache has room for if it was asked for so many."""
    return -(-tokens // STATIC_ROUNDING) * STATIC_ROUNDING


class GrowingBuffer:
    """
    Entries [batch, 1, tokens, W] that grow in place: the memory keeps room behind the last token, and is copied
    into a larger one only when that is used up. The room is 1/16 of the tokens (at least 64), so that a token is
    copied 16 times in all, however long the text becomes, and at most a sixteenth of the memory lies idle.
    """

    MIN_ROOM = 64
    ROOM_SHARE = 16

    def __init__(self) -> None:
        self.data = None
        self.length = 0  # cropping is setting it

    @property
    def data(self) -> torch.Tensor | None:
        """The memory, [batch, 1, length + room, width]."""
        return self._data

    @data.setter
    def data(self, data: torch.Tensor | None) -> None:
        self._data = data
        self._of_inference = not is_torchdynamo_compiling() and data is not None and data.is_inference()

    @property
    def is_locked(self) -> bool:
        """Whether torch forbids writing: made in inference mode, and used outside it. A compiler can ask neither: a
        compiled step replaces what an uncompiled one made in inference mode."""
        if is_torchdynamo_compiling():
            return self._of_inference
        assert self.data is not None
        return self.data.is_inference() and not torch.is_inference_mode_enabled()

    def view(self) -> torch.Tensor:
        """The entries, [batch, 1, length, width], without a copy."""
        assert self.data is not None
        return self.data[:, :, : self.length]

    def append(self, entries: torch.Tensor) -> None:
        """Write entries [batch, 1, new tokens, width] behind those already there."""
        data, start = self.data, self.length
        end = start + entries.shape[2]
        if torch.is_grad_enabled():
            # The backward pass may need the history as it is now, so nothing may be written behind its back.
            self.data = entries if data is None else torch.cat([self.view(), entries], dim=2)
        else:
            if data is None or end > data.shape[2] or self.is_locked:
                room = max(self.MIN_ROOM, end // self.ROOM_SHARE)
                grown = entries.new_empty((entries.shape[0], 1, end + room, entries.shape[3]))
                if data is not None:
                    grown[:, :, :start] = self.view()
                self.data = data = grown
            data[:, :, start:end] = entries
        self.length = end

    def change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the memory, room included, by what `function` (a move, a choice of rows) makes of it."""
        if self.data is not None:
            self.data = function(self.data)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the memory, room included."""
        return 0 if self.data is None else self.data.untyped_storage().nbytes()


class LatentLayer(CacheLayerMixin):
    """
    What latent attention asks of a cache layer, quantised ones included, beside transformers' `update`. Attention
    looks for these names and not for this class: two models in one process may each have brought their own copy of
    this file, and transformers gives both models the cache layers of the one that was loaded last.

    Entries may lie in a basis of their own ([`to_basis`], [`from_basis`]), and some may be codes (`packed`).
    """

    packed = False

    def append(self, entries: torch.Tensor) -> None:
        """Take in new entries, [batch, 1, new tokens, W]."""
        raise NotImplementedError

    def parts(self, mask: torch.Tensor | None) -> list[Part]:
        """The entries as they lie, for [`decode_attention`]. `mask`, in the order of tokens: [B or 1, 1, T, S]."""
        raise NotImplementedError

    def to_basis(self, query: torch.Tensor) -> torch.Tensor:
        """Absorbed queries [B, H*T, W] in the basis of the entries as they lie."""
        return query

    def from_basis(self, context: torch.Tensor) -> torch.Tensor:
        """What queries saw of the latents as they lie, [B, H*T, R], in the model's basis."""
        return context


def not_of_entries(keys: torch.Tensor) -> ValueError:
    """The error for a cache that was made for `keys`, [batch, heads, tokens, dims], instead of entries."""
    return ValueError(
        f"The cache was made for {keys.shape[1]} heads of {keys.shape[3]} values; latent attention caches one entry "
        "of config.latent_cache_dim. Make it by DynamicCache(config=config) or StaticCache(config=config, "
        "max_cache_len=...); early_initialization takes (batch_size, 1, config.latent_cache_dim, dtype, device). "
        "Prefix tuning makes keys and values, which have no place here: use prompt tuning or LoRA."
    )


def latent_layer(cache: Cache, layer_idx: int, width: int) -> CacheLayerMixin:
    """
    The layer of a cache that is given entries [batch, 1, tokens, W]. A `DynamicCache()` made without a config makes
    its layers when they are asked for; transformers' own are taken as they are, and hold the latents twice.

    Raises:
        ValueError: If the layer holds something else.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        # Only layers of transformers can come out of an exported graph.
        exporting = torch.compiler.is_exporting()
        cache.layers.append(cache.layer_class_to_replicate() if exporting else LatentDynamicLayer())
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "parts") and layer.keys is not None and layer.keys.dim() == 4:
        if layer.keys.shape[1] != 1 or layer.keys.shape[3] != width:
            raise not_of_entries(layer.keys)
    return layer


class OneBufferLayer(LatentLayer):
    """What the dynamic and the static latent layer share: `keys` is all there is, `values` a view of it."""

    is_initialized: bool
    kv_lora_rank: int | None = None  # R, which the first `update` tells
    keys: torch.Tensor  # None before the first update, as in the base classes

    @property
    def values(self) -> torch.Tensor:
        """View of the latents, [batch, 1, tokens, R]."""
        keys = self.keys
        return keys if keys is None else keys[..., : self.kv_lora_rank]

    @values.setter
    def values(self, _: torch.Tensor | None) -> None:
        # The base classes move, crop and reorder `keys` and then `values`. Here the second follows from the first;
        # storing it would make a copy of the latents.
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append entries and return the whole history.

        Args:
            key_states (`torch.Tensor`): New entries, [batch, 1, new tokens, W].
            value_states (`torch.Tensor`): The latents in them, [batch, 1, new tokens, R]; only their width is used.

        Returns:
            The entries [batch, 1, tokens, W] and their view of the latents [batch, 1, tokens, R], where a static
            layer's tokens are `max_cache_len`, of which the mask hides those not yet written. They lie in memory that
            the layer writes to after a `crop`; clone what has to outlive that.
        """
        if self.kv_lora_rank is None:
            self.kv_lora_rank = value_states.shape[-1]
        self.append(key_states)
        keys = self.keys
        return keys, keys[..., : self.kv_lora_rank]

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's entries: batch * tokens * W * element size."""
        return 0 if self.keys is None else self.keys.numel() * self.keys.element_size()

    def _change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the buffer by what `function` (a move, a choice of rows) makes of it."""
        if self.is_initialized:
            self.keys = function(self.keys)

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self.keys.device != self.device:
            # transformers 5.17 calls this on a side stream that does not wait for the main one, where the copy to the
            # CPU may still be under way and the memory handed out here still be read (mended there by 5.23).
            torch.cuda.current_stream(self.device).wait_stream(torch.cuda.default_stream(self.device))
            self._change(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices, ...])


class LatentDynamicLayer(OneBufferLayer, DynamicLayer):
    """Grows by the tokens it is given, without copying those already there (see [`GrowingBuffer`])."""

    _layer_type: str | None = LATENT_LAYER_TYPE

    def __init__(self, **kwargs):
        self.buffer = GrowingBuffer()
        super().__init__(**kwargs)

    @property
    def keys(self) -> torch.Tensor:
        """View of the entries, [batch, 1, tokens, W]; None before the first update, as in the base classes."""
        return None if self.buffer.data is None else self.buffer.view()  # type: ignore[return-value]

    @keys.setter
    def keys(self, entries: torch.Tensor | None) -> None:
        self.buffer.data, self.buffer.length = entries, 0 if entries is None else entries.shape[2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.buffer.length

    def append(self, entries: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(entries, entries)
        self.buffer.append(entries)

    def parts(self, mask: torch.Tensor | None) -> list[Part]:
        return [Part(self.keys.squeeze(1), mask)]

    @property
    def allocated_nbytes(self) -> int:
        """Bytes held on the device: `nbytes`, and the room for the next tokens."""
        return self.buffer.allocated_nbytes

    def _change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.buffer.change(function)

    def crop(self, tokens_to_remove: int) -> None:
        memory = self.buffer.data
        if memory is not None:
            super().crop(tokens_to_remove)
            self.buffer.data = memory  # super() gave the length; the room behind it is still there

    def reset(self) -> None:
        self.keys = None  # type: ignore[assignment]  # dropped, not zeroed: the next update starts from nothing
        self.is_initialized = False


class LatentStaticLayer(OneBufferLayer, StaticLayer):
    """Allocated once for `max_cache_len` tokens, rounded up, and written in place, for `torch.compile` and CUDA
    graphs."""

    _layer_type: str | None = LATENT_LAYER_TYPE
    cumulative_length: torch.Tensor

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len=round_up(max_cache_len), **kwargs)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        if self.num_heads != 1:
            raise not_of_entries(key_states)
        self.keys = key_states.new_zeros((self.batch_size, 1, self.max_cache_len, key_states.shape[-1]))
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not is_torchdynamo_compiling():
            # Without a static address, CUDA graphs copy the cache on every step.
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def append(self, entries: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(entries, entries)
        if entries.shape[3] != self.keys.shape[3]:
            raise not_of_entries(self.keys)
        num_new = entries.shape[2]
        positions = torch.arange(num_new, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(num_new)  # in place: its address is part of the compiled graph
        self.keys.index_copy_(2, positions, entries)

    def parts(self, mask: torch.Tensor | None) -> list[Part]:
        return [Part(self.keys.squeeze(1), mask, self.cumulative_length)]


def tensor_bytes(holder) -> int:
    """Bytes of the tensors in a tensor, a quanto tensor, or the (codes, dict of scales and zeros) of hqq."""
    if isinstance(holder, torch.Tensor):
        inner = [getattr(holder, name, None) for name in ("_data", "_scale", "_shift")]
        if isinstance(inner[0], torch.Tensor):
            return sum(tensor_bytes(part) for part in inner)
        return holder.numel() * holder.element_size()
    if isinstance(holder, dict):
        holder = list(holder.values())
    return sum(tensor_bytes(part) for part in holder) if isinstance(holder, (list, tuple)) else 0


def cache_nbytes(cache: Cache) -> int:
    """
    Bytes that a cache's tensors occupy, for latent caches and for transformers' own, dynamic, static or quantised.

    For a latent cache that is not quantised this is exactly layers * tokens * batch * W * element size. The
    tokens of a static one are its layers' `max_cache_len`: what was asked for, rounded up to a multiple of 8. A
    quantised one counts scales, zeros and its window.
    """
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "nbytes"):
            total += layer.nbytes
        else:
            held = ("keys", "values", "_quantized_keys", "_quantized_values")
            total += sum(tensor_bytes(getattr(layer, name, None)) for name in held)
    return total
