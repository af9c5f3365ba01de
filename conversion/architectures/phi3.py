"""Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up projection in another, heads that RoPE may turn
in part only."""

from collections.abc import Mapping

import torch

from ..attention_weights import SourceAttention
from ..checkpoint import TensorSource
from .base import Architecture


class Phi3(Architecture):
    model_type = "phi3"
    rotates_parts = True

    def source_attention(self, attention: Mapping[str, torch.Tensor]) -> SourceAttention:
        groups = self.config.num_key_value_heads
        sizes = [heads * self.head_dim for heads in (self.config.num_attention_heads, groups, groups)]
        q, k, v = attention["qkv_proj.weight"].split(sizes)
        o = attention["o_proj.weight"]
        return super().source_attention(
            {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": o}
        )

    def passed_on(self, tensors: TensorSource, index: int) -> dict[str, torch.Tensor]:
        layer = super().passed_on(tensors, index)
        gate, up = layer.pop("mlp.gate_up_proj.weight").chunk(2)
        return {**layer, "mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
