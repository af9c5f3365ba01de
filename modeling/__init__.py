"""The MLA Llama family. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mla_llama import MLALlamaConfig
from .latent_cache import CACHE_ARGUMENT, GrowingBuffer, LatentDynamicLayer, LatentStaticLayer, cache_nbytes
from .latent_quantized_cache import LatentQuantizedLayer, quantized_cache
from .latent_shape import LatentShape
from .modeling_mla_llama import MLALlamaForCausalLM, MLALlamaModel, MLALlamaPreTrainedModel

AutoConfig.register("mla_llama", MLALlamaConfig)
AutoModel.register(MLALlamaConfig, MLALlamaModel)
AutoModelForCausalLM.register(MLALlamaConfig, MLALlamaForCausalLM)

__all__ = [
    "CACHE_ARGUMENT",
    "GrowingBuffer",
    "LatentDynamicLayer",
    "LatentQuantizedLayer",
    "LatentShape",
    "LatentStaticLayer",
    "MLALlamaConfig",
    "MLALlamaForCausalLM",
    "MLALlamaModel",
    "MLALlamaPreTrainedModel",
    "cache_nbytes",
    "quantized_cache",
]
