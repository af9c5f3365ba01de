"""Qwen3 with experts: Qwen3's attention, and experts and routers that are passed on as they are."""

from typing import Any

from mha2mla.modeling import MLAQwen3MoeConfig, MLAQwen3MoeForCausalLM

from .qk_norm import NormalisedArchitecture


class Qwen3Moe(NormalisedArchitecture):
    model_type = "qwen3_moe"
    mla_config_class = MLAQwen3MoeConfig
    mla_model_class = MLAQwen3MoeForCausalLM
    norms_each_head = True
    has_experts = True

    def mla_config(self, **latent: Any) -> MLAQwen3MoeConfig:
        # transformers keeps the number under another name than the field's.
        return super().mla_config(num_experts=self.config.num_experts, **latent)
