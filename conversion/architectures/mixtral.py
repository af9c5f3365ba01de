"""Mixtral: a family of its own, whose experts and routers are passed on as they are."""

from mha2mla.modeling import MLAMixtralConfig, MLAMixtralForCausalLM

from .base import Architecture


class Mixtral(Architecture):
    model_type = "mixtral"
    mla_config_class = MLAMixtralConfig
    mla_model_class = MLAMixtralForCausalLM
    has_experts = True
