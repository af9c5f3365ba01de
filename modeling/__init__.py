"""The MLA Llama family. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_mla_llama import CACHE_ARGUMENT, LatentDynamicLayer, LatentStaticLayer, cache_nbytes
from .configuration_mla_llama import MLALlamaConfig
from .modeling_mla_llama import MLALlamaForCausalLM, MLALlamaModel, MLALlamaPreTrainedModel

AutoConfig.register("mla_llama", MLALlamaConfig)
AutoModel.register(MLALlamaConfig, MLALlamaModel)
AutoModelForCausalLM.register(MLALlamaConfig, MLALlamaForCausalLM)

__all__ = [
    "CACHE_ARGUMENT",
    "LatentDynamicLayer",
    "LatentStaticLayer",
    "MLALlamaConfig",
    "MLALlamaForCausalLM",
    "MLALlamaModel",
    "MLALlamaPreTrainedModel",
    "cache_nbytes",
]
