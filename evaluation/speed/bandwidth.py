"""Bytes a second: of a copy, and of decoding attention, which is to come near to it."""

import torch

from mha2mla.modeling import LatentConfigMixin
from mha2mla.modeling.latent_decode import Part, decode_attention, kernel_can_run

from .timing import time_calls


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy: what a memory-bound kernel is measured against."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # An addition, as the copies of a CUDA graph are not done by the multiprocessors.
    return 2 * source.numel() * 4 / time_calls(lambda: torch.add(source, 1, out=target), device)


@torch.no_grad()
def attention_bandwidth(config: LatentConfigMixin, batch: int, context: int, dtype, device: torch.device) -> float:
    """Bytes of entries that one layer's decoding attention gets through in a second: by the kernel where it runs, else
    by torch's absorbed attention."""
    entries = torch.randn(batch, context, config.latent_cache_dim, dtype=dtype, device=device)
    query = torch.randn(batch, config.num_attention_heads, config.latent_cache_dim, dtype=dtype, device=device)
    rank, scaling = config.kv_lora_rank, config.head_dim**-0.5

    def absorbed() -> torch.Tensor:
        weights = (query @ entries.transpose(1, 2) * scaling).softmax(-1, dtype=torch.float32).to(dtype)
        return weights @ entries[..., :rank]

    def kernel() -> torch.Tensor:
        return decode_attention(query, [Part(entries)], rank, 1, scaling)

    seconds = time_calls(kernel if kernel_can_run(entries, rank) else absorbed, device)
    return entries.numel() * entries.element_size() / seconds
