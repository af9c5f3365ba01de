"""Latent attention of models that normalise queries and keys (qk-norm: Qwen3, OLMo 2).

A normalised key is not linear in the hidden state, so the latent is taken behind the norm: keys and values of a new
token are made once, by the source's own projections and norm, and what is cached is a linear map of them. All that
reads the cache is as without norms, and at full rank the model is its source's equal.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from .latent_module import MultiHeadLatentAttention
from .latent_projection import HeadwiseLinear, is_plain


class NormalisedLatentAttention(MultiHeadLatentAttention):
    """
    Multi-head latent attention behind norms of queries and keys.

    - `q_proj` and `q_norm`, the source's, make queries; `q_b_proj` maps those of each head to their un-rotated and
      rotary dims.
    - `k_proj`, `k_norm` and `v_proj`, the source's, make keys and values of G heads; `kv_a_proj` maps them to the
      latent and the rotary keys.

    Args:
        norm (`Callable`): The family's norm, from a size and `eps`.
        per_head (`bool`): Whether it normalises each head by itself, with one gain for all (Qwen3), or all heads
            together (OLMo 2).
    """

    def __init__(self, config: Any, layer_idx: int, norm: Callable[..., nn.Module], per_head: bool):
        super().__init__(config, layer_idx)
        hidden, bias, shape = config.hidden_size, config.attention_bias, self.shape
        self.head_dim = dim = config.head_dim
        self.norm_per_head = per_head
        queries, keys = shape.num_attention_heads * dim, shape.num_key_value_heads * dim
        # In place of the base class's, which read hidden states.
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.q_norm = norm(dim if per_head else queries, eps=config.rms_norm_eps)
        self.q_b_proj = HeadwiseLinear(shape.num_attention_heads, dim, shape.qk_head_dim)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.k_norm = norm(dim if per_head else keys, eps=config.rms_norm_eps)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.kv_a_proj = nn.Linear(2 * keys, shape.width, bias=False)

    def _normalised(self, norm: nn.Module, projected: torch.Tensor) -> torch.Tensor:
        """Heads [B, T, heads, d] of a projection [B, T, heads * d], normalised."""
        heads = (-1, self.head_dim)
        return norm(projected.unflatten(-1, heads)) if self.norm_per_head else norm(projected).unflatten(-1, heads)

    def make_queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries = self._normalised(self.q_norm, self.q_proj(hidden_states)).transpose(1, 2)  # [B, H, T, d]
        sizes = [self.shape.qk_nope_head_dim, self.shape.qk_rope_head_dim]
        q_nope, q_rope = self.q_b_proj(queries).split_with_sizes(sizes, dim=-1)
        return q_nope, q_rope

    def make_entries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._normalised(self.k_norm, self.k_proj(hidden_states)).flatten(2)  # [B, T, G*d]
        entries = self.kv_a_proj(torch.cat((keys, self.v_proj(hidden_states)), dim=-1))
        return self.shape.split(entries.unsqueeze(1))

    def rope_query_rows(self) -> torch.Tensor | None:
        if not (is_plain(self.q_b_proj) and is_plain(self.q_norm)):
            return None
        rows = self.q_b_proj.weight[:, self.shape.qk_nope_head_dim :]  # [H, r, d]
        gain = cast(torch.Tensor, self.q_norm.weight).view(-1, 1, self.head_dim)
        return (rows * gain).detach()  # behind the norm a channel is as large as its gain
