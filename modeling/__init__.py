"""The MLA Llama family. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_mla_llama import CACHE_ARGUMENT, GrowingBuffer, LatentDynamicLayer, LatentStaticLayer, cache_nbytes
from .configuration_mla_llama import MLALlamaConfig
from .modeling_mla_llama import MLALlamaForCausalLM, MLALlamaModel, MLALlamaPreTrainedModel
from .quantized_cache_mla_llama import LatentQuantizedLayer, quantized_cache

AutoConfig.register("mla_llama", MLALlamaConfig)
AutoModel.register(MLALlamaConfig, MLALlamaModel)
AutoModelForCausalLM.register(MLALlamaConfig, MLALlamaForCausalLM)

__all__ = [
    "CACHE_ARGUMENT",
    "GrowingBuffer",
    "LatentDynamicLayer",
    "LatentQuantizedLayer",
    "LatentStaticLayer",
    "MLALlamaConfig",
    "MLALlamaForCausalLM",
    "MLALlamaModel",
    "MLALlamaPreTrainedModel",
    "cache_nbytes",
    "quantized_cache",
]
