"""Rotary pairs of the source's heads: pair i of a head is the dims (i, i + d/2); its frequency falls with i.

Not every pair has to turn. Where RoPE takes only a part of a head, the dims that it leaves alone are the last pairs; a
layer without RoPE has none that turn.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.common.loading import head_dim

# What Ministral 3 keeps beside the parameters of its table.
NOT_OF_TABLES = ("llama_4_scaling_beta", "max_position_embeddings")


@dataclass(frozen=True)
class Rotation:
    """
    Which pairs of a layer's heads turn.

    Attributes:
        num_pairs (`int`): Pairs of a head, d/2.
        num_turning (`int`): How many of them turn, the first ones.
        scaling (`float`): What yarn and longrope multiply cosines and sines by, of the pairs that turn.
    """

    num_pairs: int
    num_turning: int
    scaling: float = 1.0

    @property
    def turning(self) -> torch.Tensor:
        """Bool, [d/2]."""
        return torch.arange(self.num_pairs) < self.num_turning

    @property
    def score_factors(self) -> torch.Tensor:
        """What `scaling` makes of the scores of each dim of a head, [d]: un-rotated queries take it over."""
        return torch.where(self.turning, self.scaling**2, 1.0).repeat(2)

    def frequencies(self, table: torch.Tensor) -> torch.Tensor:
        """Radians per position of every pair, [d/2], given those of a rotary embedding; 0 where one stands still."""
        return pad(table[: self.num_turning], (0, self.num_pairs - self.num_turning))


def num_rotary_pairs(config: PreTrainedConfig) -> int:
    """Pairs of a head that turn, in layers with RoPE."""
    return int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2


def has_rope(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer rotates queries and keys."""
    rotating = getattr(config, "no_rope_layers", None)  # it holds 1 for RoPE, whatever its name says
    return rotating is None or bool(rotating[layer])


def every_layer_has_rope(config: PreTrainedConfig) -> bool:
    return all(has_rope(config, layer) for layer in range(config.num_hidden_layers))


def rope_attention_scaling(config: PreTrainedConfig) -> float:
    """The factor on cosines and sines that yarn and longrope bring along; 1 for all other types."""
    return float(LlamaRotaryEmbedding(config).attention_scaling)


def layer_rotation(config: PreTrainedConfig, layer: int) -> Rotation:
    """Of a layer of the source."""
    turning = num_rotary_pairs(config) if has_rope(config, layer) else 0
    return Rotation(head_dim(config) // 2, turning, rope_attention_scaling(config))


def whole_head_table(config: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters` by which Llama's rotary embedding, which knows whole heads only where nothing is scaled, has
    the source's frequencies first: theta^(-2i/p) = (theta^(d/p))^(-2i/d) for p dims that rotate."""
    parameters = {name: value for name, value in config.rope_parameters.items() if name not in NOT_OF_TABLES}
    if parameters["rope_type"] == "default":
        parameters.pop("partial_rotary_factor", None)
        parameters["rope_theta"] **= head_dim(config) / (2 * num_rotary_pairs(config))
    return parameters


def pairs_first(heads: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """
    The dims of heads in our order, given those of an architecture that rotates the first `2 * num_pairs` of them and
    has the two dims of a pair `num_pairs` apart.

    Args:
        heads (`torch.Tensor`): Rows by head, [heads, d, ...].

    Returns:
        The same, pair i being the dims (i, i + d/2), and the pairs that turn being the first.
    """
    still = (heads.shape[1] - 2 * num_pairs) // 2
    first, second, rest_first, rest_second = heads.split([num_pairs, num_pairs, still, still], dim=1)
    return torch.cat((first, rest_first, second, rest_second), dim=1)


def pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Length of each rotary pair: [..., d] -> [..., d/2]. RoPE does not change it."""
    first, second = x.chunk(2, dim=-1)
    return (first.square() + second.square()).sqrt()


def highest_pairs(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The `num_kept` pairs of highest score of each head, ascending: [G, d/2] -> [G, num_kept]."""
    return scores.topk(num_kept, dim=-1).indices.sort(dim=-1).values
