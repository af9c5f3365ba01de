"""The quantised cache in memory of a fixed size, for `torch.compile` and CUDA graphs.

`generate(..., cache_implementation="static", cache_config={"nbits": 4})`. A step asks nothing of the host: how many
tokens there are is read on the device, and so is what follows from it.

- `window` [B, 1 + K, W]: the first token, then a ring of the newest K, of position p in slot 1 + (p - 1) % K. They are
  rotated, and without the mean of the rotary keys.
- `codes` [B, S - 1, U] and `scales` [B, S - 1, 2 * groups]: the tokens that left the ring, of position p in row p - 1.

When the first token leaves the ring, the mean is taken. Until then it is zero.
"""

import torch
from transformers.cache_utils import StaticLayer
from transformers.utils import is_torchdynamo_compiling

from .latent_cache import not_of_entries, round_up
from .latent_decode import Part
from .latent_quantization import CLIPPING, CODE_BITS
from .latent_quantized_entries import MEAN_TOKENS, QuantizedEntries
from .latent_store_kernel import store_entry
from .latent_tiles import padded_columns


class LatentStaticQuantizedLayer(QuantizedEntries, StaticLayer):
    """
    One layer's entries: the first token and the `residual_length` newest in full precision, all others as codes.

    Args:
        max_cache_len (`int`): Tokens that there shall be room for.
        kwargs: See [`QuantizedEntries`].
    """

    is_croppable = False
    cumulative_length: torch.Tensor

    def __init__(self, latent_factors: torch.Tensor, rope_factors: torch.Tensor, max_cache_len: int, **settings):
        super().__init__(latent_factors, rope_factors, max_cache_len=round_up(max_cache_len), **settings)
        self.keys = self.values = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, num_heads, _, width = key_states.shape
        if num_heads != 1 or width != sum(self.sizes):
            raise not_of_entries(key_states)
        self._make_basis(self.dtype, self.device)
        units = sum(-(-size * CODE_BITS[self.form] // 16) for size in self.sizes)
        groups = sum(-(-size // group) for size, group in zip(self.sizes, self.group_sizes, strict=True))
        rows = (self.batch_size, self.max_cache_len - 1)
        self.window = key_states.new_zeros((self.batch_size, 1 + self.residual_length, width))
        self.mean = key_states.new_zeros((self.batch_size, 1, self.sizes[1]))
        self.codes = torch.zeros((*rows, units), dtype=torch.int16, device=self.device)
        self.scales = torch.zeros((*rows, 2 * groups), dtype=torch.uint8, device=self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.num_packed = torch.zeros_like(self.cumulative_length)
        if not is_torchdynamo_compiling():
            # Without a static address, CUDA graphs copy them on every step.
            counts, basis = (self.cumulative_length, self.num_packed), (self.to_rotated, self.from_rotated)
            for tensor in (*self._buffers(), *counts, *basis):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _buffers(self) -> tuple[torch.Tensor, ...]:
        return self.window, self.mean, self.codes, self.scales

    def append(self, entries: torch.Tensor) -> None:
        """Take in new entries, [batch, 1, new tokens, W]."""
        if not self.is_initialized:
            self.lazy_initialization(entries, entries)
        rotated = self.rotate(entries.detach()).squeeze(1)
        if self.is_new:
            self.is_new, rotated = False, self.change_places(rotated, dim=1)
        one_scale = all(group >= size for group, size in zip(self.group_sizes, self.sizes, strict=True))
        if rotated.shape[1] == 1 and one_scale and store_kernel_can_run(self.device):
            store_entry_op(rotated, *self._buffers(), self.cumulative_length, *self.sizes, self.form)
        else:
            self._store(rotated)
        self.cumulative_length.add_(entries.shape[2])
        torch.clamp(self.cumulative_length - self.window.shape[1], min=0, out=self.num_packed)

    def _store(self, entries: torch.Tensor) -> None:
        """Let as many tokens leave the ring as come, which are rotated entries [B, T, W], and quantise them."""
        size, num_new, count = self.residual_length, entries.shape[1], self.cumulative_length
        rank = self.sizes[0]
        # Those in the ring, oldest first, and the new ones.
        positions = count - size + torch.arange(size + num_new, device=self.device)
        ring = self.window.index_select(1, self._slots(positions[:size]))
        mean = torch.nn.functional.pad(self.mean, (rank, 0))
        ordered = torch.cat((ring + mean, entries), dim=1)

        begins = (count <= size + 1) & (count + num_new > size + 1)
        num_counted = max(MEAN_TOKENS, size + 1)
        average = self.text_mean(ordered[:, -num_counted:, rank:], positions[-num_counted:]).to(self.dtype)
        first = self.window[:, :1] + mean
        self.mean.copy_(torch.where(begins, average, self.mean))
        mean = torch.nn.functional.pad(self.mean, (rank, 0))
        ordered = ordered - mean

        codes, scales = self.encode(ordered[:, :num_new])
        leaves = positions[:num_new] > 0
        rows = torch.where(leaves, positions[:num_new] - 1, self.codes.shape[1] - 1)
        self.codes.index_copy_(1, rows, codes)
        self.scales.index_copy_(1, rows, scales)
        new_first = torch.where(count == 0, entries[:, :1], first) - mean
        self.window.index_copy_(1, self._slots(positions[num_new:]), ordered[:, num_new:])
        self.window[:, :1] = new_first

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Slots of the ring for `residual_length` consecutive positions; those before the first token share it out."""
        return 1 + (positions - 1) % self.residual_length

    def parts(self, mask: torch.Tensor | None) -> list[Part]:
        """All without the mean: that adds the same to all scores of a query, which the softmax does not feel."""
        mask = None if mask is None else self.change_places(mask, dim=-1)
        packed_mask = None if mask is None else mask[..., 1:]
        packed = self.packed_part(self.codes, self.scales, packed_mask, self.num_packed)
        return [packed, Part(self.window, mask, self.cumulative_length, ring=True)]

    def dequantized(self) -> torch.Tensor:
        """All entries as they are remembered, [batch, 1, max_cache_len, W]; behind the last one lies anything."""
        size, length = self.residual_length, self.max_cache_len
        numbers = self.decode(self.codes, self.scales).to(self.dtype)
        room = torch.nn.functional.pad(numbers, (0, 0, 1, 1))  # position p in row p, and a row for what has none
        positions = self.cumulative_length - size + torch.arange(size, device=self.device)
        room.index_copy_(
            1, torch.where(positions > 0, positions, length), self.window[:, 1:][:, self._slots(positions) - 1]
        )
        room[:, :1] = self.window[:, :1]
        room = self.change_places(room[:, :length], dim=1)
        return self.unrotate(room + torch.nn.functional.pad(self.mean, (self.sizes[0], 0))).unsqueeze(1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes as in [`OneBufferLayer.update`]. What is returned holds the new entries as they were given, so that a
        prompt attends to itself in full precision."""
        num_new, is_prompt = key_states.shape[2], self.is_new
        self.append(key_states)
        if is_prompt:
            entries = torch.nn.functional.pad(key_states, (0, 0, 0, self.max_cache_len - num_new))
            return entries, entries[..., : self.sizes[0]]
        entries = self.dequantized().to(key_states.dtype)  # autocast lowers the change of basis
        positions = self.cumulative_length - num_new + torch.arange(num_new, device=self.device)
        entries.index_copy_(2, positions, key_states)
        return entries, entries[..., : self.sizes[0]]

    def reset(self) -> None:
        self.is_new, self.sinks = True, None
        if self.is_initialized:
            for tensor in (*self._buffers(), self.cumulative_length, self.num_packed):
                tensor.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            for tensor in self._buffers():  # in place: their addresses are part of a compiled graph
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
            if self.sinks is not None:  # not in place: layers share it
                self.sinks = self.sinks.index_select(0, beam_idx.to(self.sinks.device))

    def _change_rows(self, change) -> None:
        if self.is_initialized:
            self.window, self.mean, self.codes, self.scales = map(change, self._buffers())
            self.sinks = None if self.sinks is None else change(self.sinks)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_rows(lambda x: x[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "A static quantised cache cannot forget tokens (assisted decoding): what left its window is gone. Use "
            "cache_implementation='quantized'."
        )

    def offload(self) -> None:
        raise ValueError("A static quantised cache cannot be offloaded: use cache_implementation='offloaded_static'.")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, window and mean, for `max_cache_len` tokens."""
        if not self.is_initialized:
            return 0
        return sum(tensor.numel() * tensor.element_size() for tensor in self._buffers())


def store_kernel_can_run(device: torch.device) -> bool:
    return store_entry is not None and device.type == "cuda"


# One node in a compiled graph, as `decode_attention_op`.
@torch.library.custom_op("mha2mla::store_entry", mutates_args=("window", "mean", "codes", "scales"))
def store_entry_op(
    entries: torch.Tensor,
    window: torch.Tensor,
    mean: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    length: torch.Tensor,
    rank: int,
    rope: int,
    form: str,
) -> None:
    """[`LatentStaticQuantizedLayer._store`] for one token a sequence, entries [B, 1, W], with one scale a section."""
    num_parts = 16 // CODE_BITS[form]
    store_entry[(entries.shape[0],)](
        entries, window, mean, codes, scales, length, window.shape[1] - 1, codes.shape[1], entries.stride(0),
        window.stride(0), window.stride(1), mean.stride(0), codes.stride(0), codes.stride(1), scales.stride(0),
        scales.stride(1), RANK=rank, ROPE=rope, FORM=form, BLOCK_R=padded_columns(-(-rank // num_parts)),
        BLOCK_ROPE=padded_columns(-(-rope // num_parts)), CLIPPING_1=CLIPPING[1], CLIPPING_2=CLIPPING[2], num_warps=4,
    )  # fmt: skip


@store_entry_op.register_fake
def _(entries, window, mean, codes, scales, length, rank, rope, form):
    return None
