"""Configuration of Llama models whose attention is Multi-head Latent Attention (MLA)."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

LATENT_LAYER_TYPE = "latent_attention"


@strict
class MLALlamaConfig(LlamaConfig):
    r"""
    Configuration of [`MLALlamaModel`]: a Llama model which caches, per token and layer, one latent vector and its
    rotary keys instead of keys and values.

    All arguments of [`LlamaConfig`] keep their meaning. `head_dim` stays the head size of the *source* model: it sets
    the rotary frequency table (`head_dim / 2` frequencies, scaled as `rope_parameters` says) and the softmax scale
    `head_dim ** -0.5`.

    Args:
        kv_lora_rank (`int`, *optional*, defaults to 512):
            Size R of the latent from which un-rotated keys and values are expanded.
        qk_rope_head_dim (`int`, *optional*, defaults to 64):
            Dims r of one rotary key; even. Pair j of a rotary key is the dims (j, j + r/2).
        qk_nope_head_dim (`int`, *optional*, defaults to 128):
            Dims of an un-rotated key; 0 when every dim is rotated.
        v_head_dim (`int`, *optional*, defaults to 128):
            Dims of a value head.
        num_rope_key_heads (`int`, *optional*, defaults to 1):
            Rotary keys per token: 1 (shared by all query heads, DeepSeek's layout) or `num_key_value_heads` (one for
            each key/value head, the layout of the paper MHA2MLA, arXiv 2502.14837).
        num_nope_key_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Un-rotated keys expanded per token: `num_attention_heads` or `num_key_value_heads`.

    The cache holds `kv_lora_rank + num_rope_key_heads * qk_rope_head_dim` numbers per token and layer
    (`latent_cache_dim`), against `2 * num_key_value_heads * head_dim` of the source.

    Example:

    ```python
    >>> from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM

    >>> config = MLALlamaConfig(kv_lora_rank=80, qk_rope_head_dim=40, qk_nope_head_dim=64, v_head_dim=64)
    >>> model = MLALlamaForCausalLM(config)
    ```
    """

    model_type = "mla_llama"
    # Llama's plan names k_proj and v_proj, which are not here. The MLP is sharded, attention is replicated.
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    num_rope_key_heads: int = 1
    num_nope_key_heads: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_nope_key_heads is None:
            self.num_nope_key_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        # save_pretrained adds only the entry of the class it saves; every checkpoint shall load through all three.
        if not getattr(self, "auto_map", None):
            self.auto_map = {
                "AutoConfig": "configuration_mla_llama.MLALlamaConfig",
                "AutoModel": "modeling_mla_llama.MLALlamaModel",
                "AutoModelForCausalLM": "modeling_mla_llama.MLALlamaForCausalLM",
            }

    @property
    def qk_head_dim(self) -> int:
        """Dims of an expanded query or key. Its presence also tells `generate` that key and value widths differ."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_cache_dim(self) -> int:
        """Numbers cached per token and layer."""
        return self.kv_lora_rank + self.num_rope_key_heads * self.qk_rope_head_dim

    @property
    def layer_types(self) -> list[str]:
        """One name per layer, by which `DynamicCache` and `StaticCache` pick the latent cache layers. A property, so
        that it is never serialised and never stale."""
        return [LATENT_LAYER_TYPE] * self.num_hidden_layers

    def validate_layer_type(self):
        """`layer_types` is derived and always right; upstream's check only knows upstream's names."""

    def validate_architecture(self):
        """Part of `@strict` validation: every message names the field and what it may be."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads != 0:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}).")
        if self.kv_lora_rank < 1:
            raise ValueError(f"kv_lora_rank must be at least 1, got {self.kv_lora_rank}.")
        if self.v_head_dim < 1 or self.qk_nope_head_dim < 0:
            raise ValueError(
                f"v_head_dim must be at least 1 and qk_nope_head_dim at least 0, got {self.v_head_dim} and "
                f"{self.qk_nope_head_dim}."
            )
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2 != 0:
            raise ValueError(f"qk_rope_head_dim must be even and at least 2, got {self.qk_rope_head_dim}.")
        if self.num_rope_key_heads not in (1, kv_heads):
            raise ValueError(
                f"num_rope_key_heads must be 1 (shared) or num_key_value_heads ({kv_heads}), got "
                f"{self.num_rope_key_heads}."
            )
        if self.num_nope_key_heads not in (kv_heads, heads):
            raise ValueError(
                f"num_nope_key_heads must be num_key_value_heads ({kv_heads}) or num_attention_heads ({heads}), got "
                f"{self.num_nope_key_heads}."
            )


MLALlamaConfig.register_for_auto_class()
