"""Granite: Llama's block with four multipliers, each of which is one of weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..attention_weights import SourceAttention
from ..checkpoint import TensorSource
from .base import Architecture


class Granite(Architecture):
    model_type = "granite"

    def embedding(self, tensors: TensorSource) -> torch.Tensor:
        return super().embedding(tensors) * self.config.embedding_multiplier

    def norm(self, tensors: TensorSource) -> torch.Tensor:
        """The head may be the embedding: what scales the logits, and undoes the embedding's multiplier then, goes into
        the norm before it."""
        scaling = self.config.logits_scaling * (self.config.embedding_multiplier if self.ties_embeddings else 1)
        return super().norm(tensors) / scaling

    def head(self, tensors: TensorSource) -> torch.Tensor:
        return self.embedding(tensors) if self.ties_embeddings else super().head(tensors)

    def source_attention(self, attention: Mapping[str, torch.Tensor]) -> SourceAttention:
        source = super().source_attention(attention)
        scores, residual = self.config.attention_multiplier * self.head_dim**0.5, self.config.residual_multiplier
        return replace(
            source,
            q=source.q * scores,
            q_bias=None if source.q_bias is None else source.q_bias * scores,
            o=source.o * residual,
            o_bias=None if source.o_bias is None else source.o_bias * residual,
        )

    def attention_output(
        self, layer: Any, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        return super().attention_output(layer, x, position_embeddings) * self.config.residual_multiplier

    def layer_output(self, layer: Any, state: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        state = state + attention
        return state + layer.mlp(layer.post_attention_layernorm(state)) * self.config.residual_multiplier

    def passed_on(self, tensors: TensorSource, index: int) -> dict[str, torch.Tensor]:
        layer = super().passed_on(tensors, index)
        for name in layer.keys() & {"mlp.down_proj.weight", "mlp.down_proj.bias"}:
            layer[name] = layer[name] * self.config.residual_multiplier
        return layer
