"""Configuration of Qwen3 models whose attention is Multi-head Latent Attention (MLA)."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from .latent_config import NORMALISED_PROJECTIONS, LatentConfigMixin


@strict
class MLAQwen3Config(LatentConfigMixin, Qwen3Config):
    r"""
    Configuration of [`MLAQwen3Model`]: a Qwen3 model which caches, per token and layer, one latent vector and its
    rotary keys instead of keys and values. All arguments of [`Qwen3Config`] keep their meaning, but there are no
    sliding windows; those of latent attention are in [`LatentConfigMixin`].
    """

    model_type = "mla_qwen3"
    attention_projections = NORMALISED_PROJECTIONS


MLAQwen3Config.register_for_auto_class()
