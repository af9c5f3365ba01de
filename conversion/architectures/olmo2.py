"""OLMo 2: norms on all queries and on all keys, and on what attention and MLP give instead of on what they read."""

from typing import Any

import torch

from mha2mla.modeling import MLAOlmo2Config, MLAOlmo2ForCausalLM

from .qk_norm import NormalisedArchitecture


class Olmo2(NormalisedArchitecture):
    model_type = "olmo2"
    mla_config_class = MLAOlmo2Config
    mla_model_class = MLAOlmo2ForCausalLM
    norms_each_head = False

    def attention_input(self, layer: Any, state: torch.Tensor) -> torch.Tensor:
        return state

    def layer_output(self, layer: Any, state: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        state = state + layer.post_attention_layernorm(attention)
        return state + layer.post_feedforward_layernorm(layer.mlp(state))
