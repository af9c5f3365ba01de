"""Qwen3: Llama's block with a norm on each head of queries and keys."""

from mha2mla.modeling import MLAQwen3Config, MLAQwen3ForCausalLM

from .qk_norm import NormalisedArchitecture


class Qwen3(NormalisedArchitecture):
    model_type = "qwen3"
    mla_config_class = MLAQwen3Config
    mla_model_class = MLAQwen3ForCausalLM
    norms_each_head = True
