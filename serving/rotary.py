"""Rotary embedding for vLLM's models, in torch: vLLM's own has one table for all layers."""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.common.kernel_sizes import longest_text
from mha2mla.modeling import LatentShape
from mha2mla.modeling.latent_attention import default_rope_frequencies

from .padding import grow


class LayerRotary(nn.Module):
    """
    RoPE with frequencies of a layer's own, out of the model's table in transformers. It turns pairs (j, j + r'/2).

    Args:
        shape (`LatentShape`): Of the checkpoint.
        num_pairs (`int`): r'/2.
        max_model_len (`int`): Tokens of the longest text.

    Raises:
        ValueError: If the frequencies change with the length of a text, and texts get that long.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: Any, shape: LatentShape, num_pairs: int, max_model_len: int):
        super().__init__()
        limit = longest_text(config)
        if limit is not None and max_model_len > limit:
            kind = config.rope_parameters["rope_type"]
            raise ValueError(
                f"rope_type={kind!r} has other rotary frequencies for texts of more than {limit} tokens, and what is "
                f"cached would be wrong: serve with --max-model-len {limit}, or use transformers."
            )
        table = LlamaRotaryEmbedding(config)
        self.frequencies, self.factor = table.inv_freq, table.attention_scaling
        self.register_buffer("inv_freq", torch.zeros(num_pairs, dtype=torch.float32), persistent=False)
        self.choose(default_rope_frequencies(shape, config.head_dim))

    def choose(self, rope_frequencies: torch.Tensor) -> None:
        """Turn pair j by the frequency of index `rope_frequencies[0, j]`, [1, r/2]; pairs behind stand still."""
        chosen = self.frequencies[rope_frequencies[0].to(self.frequencies.device)]
        self.inv_freq.copy_(grow(chosen, len(self.inv_freq), 0))

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x [T, heads, r'] turned by its positions [T]; computed in fp32, in the type of x."""
        angles = positions[:, None, None].float() * self.inv_freq  # [T, 1, r'/2]
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
