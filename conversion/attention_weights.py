"""An attention layer before and after conversion, as plain tensors."""

from dataclasses import dataclass, fields, replace

import torch


@dataclass
class SourceAttention:
    """
    Attention of a Llama-type layer, fp32.

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

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], head_dim: int) -> "SourceAttention":
        """From `{"q_proj.weight": ..., "q_proj.bias": ...}` of one layer, in any float type."""

        def by_head(name: str) -> torch.Tensor | None:
            tensor = tensors.get(name)
            return None if tensor is None else tensor.float().unflatten(0, (-1, head_dim))

        o_bias = tensors.get("o_proj.bias")
        return cls(
            q=tensors["q_proj.weight"].float().unflatten(0, (-1, head_dim)),
            k=tensors["k_proj.weight"].float().unflatten(0, (-1, head_dim)),
            v=tensors["v_proj.weight"].float().unflatten(0, (-1, head_dim)),
            o=tensors["o_proj.weight"].float(),
            q_bias=by_head("q_proj.bias"),
            k_bias=by_head("k_proj.bias"),
            v_bias=by_head("v_proj.bias"),
            o_bias=None if o_bias is None else o_bias.float(),
        )

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

    def state_dict(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of `MLALlamaAttention` by name; weights in `dtype`, frequencies as integers."""
        tensors = {
            "q_proj.weight": torch.cat((self.q_nope, self.q_rope), dim=1).flatten(0, 1),
            "kv_a_proj.weight": torch.cat((self.latent, self.k_rope.flatten(0, 1))),
            "kv_b_proj.weight": torch.cat((self.k_up.flatten(0, 1), self.v_up.flatten(0, 1))),
            "o_proj.weight": self.o,
        }
        if self.o_bias is not None:
            assert self.q_nope_bias is not None and self.q_rope_bias is not None and self.k_rope_bias is not None
            latent_bias = self.latent.new_zeros(self.latent.shape[0])
            tensors |= {
                "q_proj.bias": torch.cat((self.q_nope_bias, self.q_rope_bias), dim=1).flatten(),
                "kv_a_proj.bias": torch.cat((latent_bias, self.k_rope_bias.flatten())),
                "o_proj.bias": self.o_bias,
            }
        tensors = {name: tensor.to(device="cpu", dtype=dtype).contiguous() for name, tensor in tensors.items()}
        return tensors | {"rope_frequencies": self.rope_frequencies.cpu().contiguous().clone()}
