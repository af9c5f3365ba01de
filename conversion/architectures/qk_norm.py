"""Blocks that normalise queries and keys. What follows the norms is converted; what makes the heads stays as it is."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..attention_weights import LatentAttention, NormalisedHeads, SourceAttention
from ..checkpoint import TensorSource
from .base import Architecture


class NormalisedArchitecture(Architecture):
    """Llama's names, with `q_norm` and `k_norm` beside the projections. A subclass names its family, and says whether
    each head is normalised by itself or all of them together."""

    norms_each_head: ClassVar[bool]

    def check_tensors(self, tensors: TensorSource) -> None:
        """The norms belong there."""

    @property
    def latent_inputs(self) -> int:
        return 2 * self.config.num_key_value_heads * self.head_dim

    def source_attention(self, attention: Mapping[str, torch.Tensor]) -> SourceAttention:
        plain = super().source_attention(attention)

        def gain(name: str) -> torch.Tensor:
            """[d] of a norm of each head, [heads, d] of one of all together."""
            weight = attention[f"{name}.weight"].float()
            return weight if self.norms_each_head else weight.unflatten(0, (-1, self.head_dim))

        heads = NormalisedHeads(
            plain.q,
            plain.k,
            plain.v,
            gain("q_norm"),
            gain("k_norm"),
            self.config.rms_norm_eps,
            plain.q_bias,
            plain.k_bias,
            plain.v_bias,
        )
        return SourceAttention.behind_norms(heads, plain.o, plain.o_bias)

    def mla_attention(self, latent: LatentAttention) -> dict[str, torch.Tensor]:
        heads = latent.normalised
        assert heads is not None
        attention = {
            "q_proj.weight": heads.q.flatten(0, 1),
            "q_norm.weight": heads.q_gain.flatten(),
            "q_b_proj.weight": torch.cat((latent.q_nope, latent.q_rope), dim=1),
            "k_proj.weight": heads.k.flatten(0, 1),
            "k_norm.weight": heads.k_gain.flatten(),
            "v_proj.weight": heads.v.flatten(0, 1),
            "kv_a_proj.weight": torch.cat((latent.latent, latent.k_rope.flatten(0, 1))),
            "kv_b_proj.weight": torch.cat((latent.k_up.flatten(0, 1), latent.v_up.flatten(0, 1))),
            "o_proj.weight": latent.o,
            "rope_frequencies": latent.rope_frequencies.clone(),
        }
        biases = {"q_proj": heads.q_bias, "k_proj": heads.k_bias, "v_proj": heads.v_bias, "o_proj": latent.o_bias}
        return attention | {f"{name}.bias": bias.flatten() for name, bias in biases.items() if bias is not None}
