"""The MLA families. Importing this package registers them with transformers' Auto classes."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from transformers import AutoConfig

from .configuration_mla_llama import MLALlamaConfig
from .configuration_mla_mixtral import MLAMixtralConfig
from .configuration_mla_olmo2 import MLAOlmo2Config
from .configuration_mla_qwen3 import MLAQwen3Config
from .configuration_mla_qwen3_moe import MLAQwen3MoeConfig
from .latent_cache import CACHE_ARGUMENT, GrowingBuffer, LatentDynamicLayer, LatentStaticLayer, cache_nbytes
from .latent_config import LatentConfigMixin
from .latent_quantized_cache import LatentQuantizedLayer, quantized_cache
from .latent_shape import LatentShape
from .latent_static_quantized_cache import LatentStaticQuantizedLayer
from .modeling_mla_llama import (
    MLALlamaForCausalLM,
    MLALlamaForQuestionAnswering,
    MLALlamaForSequenceClassification,
    MLALlamaForTokenClassification,
    MLALlamaModel,
    MLALlamaPreTrainedModel,
)
from .modeling_mla_mixtral import MLAMixtralForCausalLM, MLAMixtralModel
from .modeling_mla_olmo2 import MLAOlmo2ForCausalLM, MLAOlmo2Model
from .modeling_mla_qwen3 import MLAQwen3ForCausalLM, MLAQwen3Model
from .modeling_mla_qwen3_moe import MLAQwen3MoeForCausalLM, MLAQwen3MoeModel

try:  # what `LoraConfig()` adapts; an old peft may not import with a new transformers
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
except ImportError:
    LORA_TARGETS = {}

# The causal language models of the families, by model type: one in every `modeling_mla_*.py` of this folder.
FAMILIES: dict[str, Any] = {}

for info in iter_modules(__path__):
    if info.name.startswith("modeling_mla_"):
        found = vars(import_module(f".{info.name}", __name__))
        (model_class,) = (found[name] for name in found if name.startswith("MLA") and name.endswith("ForCausalLM"))
        config_class = model_class.config_class
        FAMILIES[config_class.model_type] = model_class
        AutoConfig.register(config_class.model_type, config_class)
        LORA_TARGETS[config_class.model_type] = list(config_class.attention_projections)

__all__ = [
    "CACHE_ARGUMENT",
    "FAMILIES",
    "GrowingBuffer",
    "LatentConfigMixin",
    "LatentDynamicLayer",
    "LatentQuantizedLayer",
    "LatentShape",
    "LatentStaticLayer",
    "LatentStaticQuantizedLayer",
    "MLALlamaConfig",
    "MLALlamaForCausalLM",
    "MLALlamaForQuestionAnswering",
    "MLALlamaForSequenceClassification",
    "MLALlamaForTokenClassification",
    "MLALlamaModel",
    "MLALlamaPreTrainedModel",
    "MLAMixtralConfig",
    "MLAMixtralForCausalLM",
    "MLAMixtralModel",
    "MLAOlmo2Config",
    "MLAOlmo2ForCausalLM",
    "MLAOlmo2Model",
    "MLAQwen3Config",
    "MLAQwen3ForCausalLM",
    "MLAQwen3Model",
    "MLAQwen3MoeConfig",
    "MLAQwen3MoeForCausalLM",
    "MLAQwen3MoeModel",
    "cache_nbytes",
    "quantized_cache",
]
