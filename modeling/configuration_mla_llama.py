"""Configuration of Llama models whose attention is Multi-head Latent Attention (MLA)."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from .latent_config import LatentConfigMixin


@strict
class MLALlamaConfig(LatentConfigMixin, LlamaConfig):
    r"""
    Configuration of [`MLALlamaModel`]: a Llama model which caches, per token and layer, one latent vector and its
    rotary keys instead of keys and values. All arguments of [`LlamaConfig`] keep their meaning; those of latent
    attention are in [`LatentConfigMixin`].

    Args:
        gated_mlp (`bool`, *optional*, defaults to `True`):
            Whether the MLP is Llama's, the product of two projections; else it is Arcee's, with one.

    Example:

    ```python
    >>> from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM

    >>> config = MLALlamaConfig(kv_lora_rank=80, qk_rope_head_dim=40, qk_nope_head_dim=64, v_head_dim=64)
    >>> model = MLALlamaForCausalLM(config)
    ```
    """

    model_type = "mla_llama"

    gated_mlp: bool = True


MLALlamaConfig.register_for_auto_class()
