"""The MLA Llama family. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig

from .configuration_mla_llama import MLALlamaConfig
from .latent_cache import CACHE_ARGUMENT, GrowingBuffer, LatentDynamicLayer, LatentStaticLayer, cache_nbytes
from .latent_module import PROJECTIONS
from .latent_quantized_cache import LatentQuantizedLayer, quantized_cache
from .latent_shape import LatentShape
from .modeling_mla_llama import (
    MLALlamaForCausalLM,
    MLALlamaForQuestionAnswering,
    MLALlamaForSequenceClassification,
    MLALlamaForTokenClassification,
    MLALlamaModel,
    MLALlamaPreTrainedModel,
)

AutoConfig.register("mla_llama", MLALlamaConfig)

try:  # what `LoraConfig()` adapts; an old peft may not import with a new transformers
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
except ImportError:
    pass
else:
    LORA_TARGETS["mla_llama"] = list(PROJECTIONS)

__all__ = [
    "CACHE_ARGUMENT",
    "GrowingBuffer",
    "LatentDynamicLayer",
    "LatentQuantizedLayer",
    "LatentShape",
    "LatentStaticLayer",
    "MLALlamaConfig",
    "MLALlamaForCausalLM",
    "MLALlamaForQuestionAnswering",
    "MLALlamaForSequenceClassification",
    "MLALlamaForTokenClassification",
    "MLALlamaModel",
    "MLALlamaPreTrainedModel",
    "cache_nbytes",
    "quantized_cache",
]
