"""Ministral 3: Mistral's block, up to the length from which on its queries grow with their position."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from .base import Architecture


def refuse_growing_queries(config: PreTrainedConfig) -> None:
    """A query at position m is multiplied by 1 + beta log(1 + floor(m / original length)): by 1 below that length."""
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    original = config.rope_parameters.get("original_max_position_embeddings")
    for field, value in (("llama_4_scaling_beta", beta), ("original_max_position_embeddings", original)):
        if value is None:
            raise ValueError(
                f"rope_parameters has no {field}, without which transformers' Ministral 3 does not run. Set it in "
                "config.json; a llama_4_scaling_beta of 0 leaves queries as they are."
            )
    if beta and config.max_position_embeddings > original:
        raise ValueError(
            f"rope_parameters.llama_4_scaling_beta={beta} makes queries larger from position {original} on, and those "
            "of the converted model do not depend on their position. If shorter texts are enough, set "
            f"max_position_embeddings ({config.max_position_embeddings}) to {original} in its config.json: up to "
            "there nothing is lost."
        )


class Ministral3(Architecture):
    model_type = "ministral3"
    refusals = (*Architecture.refusals, refuse_growing_queries)

    def attention_output(
        self, layer: Any, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return layer.self_attn(x, position_embeddings, attention_mask=None, position_ids=positions)[0]
