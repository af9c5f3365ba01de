"""Rotary pairs of the source's heads: pair i of a head is the dims (i, i + d/2); its frequency falls with i."""

import torch
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def head_dim(config: PreTrainedConfig) -> int:
    """Dims d of the source's query, key and value heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_attention_scaling(config: PreTrainedConfig) -> float:
    """The factor on cosines and sines that yarn and longrope bring along; 1 for all other types."""
    return float(LlamaRotaryEmbedding(config).attention_scaling)


def pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Length of each rotary pair: [..., d] -> [..., d/2]. RoPE does not change it."""
    first, second = x.chunk(2, dim=-1)
    return (first.square() + second.square()).sqrt()


def highest_pairs(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The `num_kept` pairs of highest score of each head, ascending: [G, d/2] -> [G, num_kept]."""
    return scores.topk(num_kept, dim=-1).indices.sort(dim=-1).values
