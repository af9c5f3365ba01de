"""Configuration of Mixtral models whose attention is Multi-head Latent Attention (MLA)."""

from huggingface_hub.dataclasses import strict
from transformers.models.mixtral.configuration_mixtral import MixtralConfig

from .latent_config import LatentConfigMixin


@strict
class MLAMixtralConfig(LatentConfigMixin, MixtralConfig):
    r"""
    Configuration of [`MLAMixtralModel`]: a Mixtral model which caches, per token and layer, one latent vector and its
    rotary keys instead of keys and values. All arguments of [`MixtralConfig`] keep their meaning; those of latent
    attention are in [`LatentConfigMixin`].

    Args:
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of attention have biases.
    """

    model_type = "mla_mixtral"
    # Experts are sharded, attention is replicated.
    base_model_tp_plan = {
        name: plan for name, plan in MixtralConfig.base_model_tp_plan.items() if ".self_attn." not in name
    }

    attention_bias: bool = False

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


MLAMixtralConfig.register_for_auto_class()
