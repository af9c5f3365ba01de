"""An attention layer before and after conversion, as plain tensors."""

from dataclasses import dataclass, fields, replace

import torch

from mha2mla.modeling import LatentShape


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., T, D] through a projection by head [heads, d, D] with bias [heads, d]: [..., heads, T, d]."""
    out = torch.nn.functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, weight.shape[:2]).transpose(-2, -3)


@dataclass
class SourceAttention:
    """
    Softmax attention over rotated keys, fp32.

    Attributes:
        q, k, v (`torch.Tensor`): Projections by head, [H, d, hidden], [G, d, hidden], [G, d, hidden].
        o (`torch.Tensor`): Output projection, [hidden, H * d].
        q_bias, k_bias, v_bias, o_bias (`torch.Tensor`, *optional*): [H, d], [G, d], [G, d], [hidden].
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None

    def to(self, device: str) -> "SourceAttention":
        """The same on another device."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors if tensor is not None})

    @property
    def has_bias(self) -> bool:
        return any(b is not None for b in (self.q_bias, self.k_bias, self.v_bias, self.o_bias))

    def output_bias(self) -> torch.Tensor:
        """
        Bias of the output projection with the values' bias folded in, [hidden].

        Attention probabilities sum to one, so a constant b_v in every value leaves head h as W_o,h b_v.
        """
        bias = self.o.new_zeros(self.o.shape[0]) if self.o_bias is None else self.o_bias
        if self.v_bias is None:
            return bias
        num_heads, num_kv_heads = self.q.shape[0], self.k.shape[0]
        return bias + self.o @ self.v_bias.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten()


@dataclass
class LatentAttention:
    """
    The same layer as Multi-head Latent Attention: N un-rotated key heads (G or H), n rotary key heads (1 or G).

    Attributes:
        q_nope (`torch.Tensor`): Un-rotated queries, [H, nope, hidden].
        q_rope (`torch.Tensor`): Queries that get RoPE, [H, r, hidden].
        latent (`torch.Tensor`): Down-projection, [R, hidden].
        k_rope (`torch.Tensor`): Rotary keys, [n, r, hidden].
        k_up (`torch.Tensor`): Latent to un-rotated keys, [N, nope, R].
        v_up (`torch.Tensor`): Latent to values, [G, v, R].
        o (`torch.Tensor`): Output projection, [hidden, H * v].
        rope_frequencies (`torch.Tensor`): Frequency index of each rotary pair, [n, r/2], int64.
        q_nope_bias, q_rope_bias, k_rope_bias, o_bias (`torch.Tensor`, *optional*): [H, nope], [H, r], [n, r],
            [hidden]; all or none.
    """

    q_nope: torch.Tensor
    q_rope: torch.Tensor
    latent: torch.Tensor
    k_rope: torch.Tensor
    k_up: torch.Tensor
    v_up: torch.Tensor
    o: torch.Tensor
    rope_frequencies: torch.Tensor
    q_nope_bias: torch.Tensor | None = None
    q_rope_bias: torch.Tensor | None = None
    k_rope_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None

    @property
    def shape(self) -> LatentShape:
        return LatentShape(
            num_attention_heads=self.q_rope.shape[0],
            num_key_value_heads=self.v_up.shape[0],
            num_nope_key_heads=self.k_up.shape[0],
            num_rope_key_heads=self.k_rope.shape[0],
            kv_lora_rank=self.latent.shape[0],
            qk_nope_head_dim=self.k_up.shape[1],
            qk_rope_head_dim=self.k_rope.shape[1],
            v_head_dim=self.v_up.shape[1],
        )
