"""Configuration of OLMo 2 models whose attention is Multi-head Latent Attention (MLA)."""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

from .latent_config import NORMALISED_PROJECTIONS, LatentConfigMixin


@strict
class MLAOlmo2Config(LatentConfigMixin, Olmo2Config):
    r"""
    Configuration of [`MLAOlmo2Model`]: an OLMo 2 model which caches, per token and layer, one latent vector and its
    rotary keys instead of keys and values. All arguments of [`Olmo2Config`] keep their meaning; those of latent
    attention are in [`LatentConfigMixin`].

    Args:
        head_dim (`int`, *optional*, defaults to `hidden_size / num_attention_heads`):
            Head size of the source.
    """

    model_type = "mla_olmo2"
    attention_projections = NORMALISED_PROJECTIONS

    head_dim: int | None = None  # type: ignore[assignment]  # until __post_init__ is over

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


MLAOlmo2Config.register_for_auto_class()
