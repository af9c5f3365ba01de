"""Arcee (AFM): Llama's block with an MLP of one projection and the square of a ReLU."""

from typing import Any

from mha2mla.modeling import MLALlamaConfig

from .base import Architecture


class Arcee(Architecture):
    model_type = "arcee"

    def mla_config(self, **latent: Any) -> MLALlamaConfig:
        return super().mla_config(gated_mlp=False, **latent)
