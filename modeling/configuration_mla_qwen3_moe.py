"""Configuration of Qwen3's mixtures of experts whose attention is Multi-head Latent Attention (MLA)."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from .latent_config import NORMALISED_PROJECTIONS, LatentConfigMixin


@strict
class MLAQwen3MoeConfig(LatentConfigMixin, Qwen3MoeConfig):
    r"""
    Configuration of [`MLAQwen3MoeModel`]: a Qwen3 model with experts which caches, per token and layer, one latent
    vector and its rotary keys instead of keys and values. All arguments of [`Qwen3MoeConfig`] keep their meaning, but
    there are no sliding windows; those of latent attention are in [`LatentConfigMixin`].
    """

    model_type = "mla_qwen3_moe"
    attention_projections = NORMALISED_PROJECTIONS
    # Experts are sharded, attention is replicated.
    base_model_tp_plan = {
        name: plan for name, plan in Qwen3MoeConfig.base_model_tp_plan.items() if ".self_attn." not in name
    }

    head_dim: int | None = None  # type: ignore[assignment]  # until it is computed
    sliding_window: int | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


MLAQwen3MoeConfig.register_for_auto_class()
