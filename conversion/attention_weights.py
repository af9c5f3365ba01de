"""An attention layer before and after conversion, as plain tensors."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from mha2mla.modeling import LatentShape


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., T, D] through a projection by head [heads, d, D] with bias [heads, d]: [..., heads, T, d]."""
    out = torch.nn.functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, weight.shape[:2]).transpose(-2, -3)


def on_device(weights: Any, device: str) -> Any:
    """The same weights, a dataclass of tensors and of such, on another device."""
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return replace(weights, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})


@dataclass
class NormalisedHeads:
    """
    Queries, keys and values of attention that normalises queries and keys (qk-norm), fp32. What follows the norms is
    linear in these heads, and not in the hidden states.

    Attributes:
        q, k, v (`torch.Tensor`): Projections by head, [H, d, hidden], [G, d, hidden], [G, d, hidden].
        q_gain, k_gain (`torch.Tensor`): Weights of the norms: [d] where each head is normalised by itself, [H, d] and
            [G, d] where all heads are together.
        eps (`float`): Of the norms.
        q_bias, k_bias, v_bias (`torch.Tensor`, *optional*): [H, d], [G, d], [G, d].
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_gain: torch.Tensor
    k_gain: torch.Tensor
    eps: float
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None

    def to(self, device: str) -> "NormalisedHeads":
        """The same on another device."""
        return on_device(self, device)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised queries [..., H, T, d] of hidden states [..., T, hidden]."""
        return normalise(project(x, self.q, self.q_bias), self.q_gain, self.eps)

    def keys_values(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised keys of all heads, then values of all heads, [..., T, 2 * G * d]."""
        keys = normalise(project(x, self.k, self.k_bias), self.k_gain, self.eps)
        values = project(x, self.v, self.v_bias)
        return torch.cat((keys, values), dim=-3).transpose(-2, -3).flatten(-2)

    def key_weights(self) -> torch.Tensor:
        """The key projection with the gain, and with the norm as it is for hidden states that are alike in all
        directions and of variance 1, [G, d, hidden]."""
        dims = (1, 2) if self.k_gain.dim() == 1 else (0, 1, 2)
        power = self.k.square().sum(dims, keepdim=True) / self.k_gain.numel()
        power = power.clamp_min(torch.finfo(power.dtype).tiny)  # heads that were pruned stay zero
        return self.k * power.rsqrt() * self.k_gain[..., None]


def normalise(heads: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of heads [..., heads, T, d]: of each with gain [d], or of all together with gain [heads, d]."""
    heads = heads.float()  # also under autocast
    dims = -1 if gain.dim() == 1 else (-3, -1)
    scale = (heads.square().mean(dims, keepdim=True) + eps).rsqrt()
    return heads * scale * (gain if gain.dim() == 1 else gain[:, None])


@dataclass
class SourceAttention:
    """
    Softmax attention over rotated keys, fp32.

    Where queries and keys are normalised, what is linear begins behind the norms: queries are linear in the d numbers
    of their own head, keys and values in the 2 G d numbers of all normalised keys and values; the matrices are then
    unit ones.

    Attributes:
        q, k, v (`torch.Tensor`): Projections by head, [H, d, hidden], [G, d, hidden], [G, d, hidden]; behind norms
            [H, d, d], [G, d, 2 G d], [G, d, 2 G d].
        o (`torch.Tensor`): Output projection, [hidden, H * d].
        q_bias, k_bias, v_bias, o_bias (`torch.Tensor`, *optional*): [H, d], [G, d], [G, d], [hidden].
        normalised (`NormalisedHeads`, *optional*): What makes the heads, where they are normalised.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    normalised: NormalisedHeads | None = None

    @classmethod
    def behind_norms(
        cls, normalised: NormalisedHeads, o: torch.Tensor, o_bias: torch.Tensor | None
    ) -> "SourceAttention":
        """Attention over normalised heads."""
        num_heads, head_dim, _ = normalised.q.shape
        keys_values = torch.eye(2 * normalised.k.shape[0] * head_dim, device=o.device).unflatten(0, (2, -1, head_dim))
        unit = torch.eye(head_dim, device=o.device).expand(num_heads, -1, -1)
        return cls(unit, keys_values[0], keys_values[1], o, o_bias=o_bias, normalised=normalised)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Queries before rotation [..., H, T, d] of hidden states [..., T, hidden]."""
        return project(x, self.q, self.q_bias) if self.normalised is None else self.normalised.queries(x)

    def keys(self, inputs: torch.Tensor) -> torch.Tensor:
        """Keys before rotation [..., G, T, d] of [`inputs`]."""
        return project(inputs, self.k, self.k_bias)

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What keys and values are linear in, [..., T, D], of hidden states [..., T, hidden]."""
        return x if self.normalised is None else self.normalised.keys_values(x)

    def to(self, device: str) -> "SourceAttention":
        """The same on another device."""
        return on_device(self, device)

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
    The same layer as Multi-head Latent Attention: N un-rotated key heads (G or H), n rotary key heads (1 or G). Behind
    norms, queries are made of the d numbers of their own head, and latent and rotary keys of the 2 G d numbers of all
    normalised keys and values, instead of `hidden`.

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
            [hidden]; all or none, or, behind norms, the last or none.
        normalised (`NormalisedHeads`, *optional*): What makes the heads, where they are normalised.
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
    normalised: NormalisedHeads | None = None

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

    def queries(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated [..., H, T, nope] and rotary queries [..., H, T, r] of hidden states [..., T, hidden]."""
        if self.normalised is None:
            return project(x, self.q_nope, self.q_nope_bias), project(x, self.q_rope, self.q_rope_bias)
        heads = self.normalised.queries(x)
        return heads @ self.q_nope.mT, heads @ self.q_rope.mT

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What latent and rotary keys are linear in, of hidden states [..., T, hidden]."""
        return x if self.normalised is None else self.normalised.keys_values(x)
