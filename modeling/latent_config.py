"""What the config of a family of latent attention adds to the config of the family it comes from."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import transformers

from .latent_shape import LatentShape

# The name by which `DynamicCache` and `StaticCache` find the latent cache layers.
LATENT_LAYER_TYPE = "latent_attention"
# The newest layout of weights and config that this code reads. A change that older code would misread raises it.
FORMAT_VERSION = 1
# The linear layers of attention: what LoRA is for.
PROJECTIONS = ("q_proj", "kv_a_proj", "kv_b_proj", "o_proj")
# The same where queries and keys are normalised, and the latent is made of keys and values.
NORMALISED_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "kv_a_proj", "kv_b_proj", "o_proj")


@dataclass(repr=False, kw_only=True)
class LatentConfigMixin:
    """
    Sizes of latent attention, for a config with `num_attention_heads`, `num_key_value_heads` and `head_dim`. The last
    stays the head size of the *source* model: it sets the rotary frequency table (`head_dim / 2` frequencies, scaled
    as `rope_parameters` says) and the softmax scale `head_dim ** -0.5`.

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
        mla_format_version (`int`, *optional*, defaults to the newest):
            Layout of the checkpoint's weights and config.

    The cache holds `kv_lora_rank + num_rope_key_heads * qk_rope_head_dim` values per token and layer
    (`latent_cache_dim`), against `2 * num_key_value_heads * head_dim` of the source.
    """

    attention_projections: ClassVar[tuple[str, ...]] = PROJECTIONS
    # For tensor parallelism. The source's plan names k_proj and v_proj. The MLP is sharded, attention is replicated.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # Auto classes of transformers, and what follows the family's name in their models' names.
    auto_models: ClassVar[dict[str, str]] = {
        "AutoModel": "Model",
        "AutoModelForCausalLM": "ForCausalLM",
        "AutoModelForQuestionAnswering": "ForQuestionAnswering",
        "AutoModelForSequenceClassification": "ForSequenceClassification",
        "AutoModelForTokenClassification": "ForTokenClassification",
    }

    if TYPE_CHECKING:  # what the config of the source's family brings
        model_type: str
        num_attention_heads: int
        num_hidden_layers: int
        num_key_value_heads: int
        head_dim: int
        max_position_embeddings: int
        hidden_act: str
        rms_norm_eps: float
        rope_parameters: dict[str, Any]

        def __init__(self, **kwargs: Any) -> None: ...

    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    num_rope_key_heads: int = 1
    num_nope_key_heads: int | None = None
    mla_format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.mla_format_version > FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has mla_format_version={self.mla_format_version}; this code reads versions up to "
                f"{FORMAT_VERSION}. Upgrade it (`pip install .` in a newer checkout of mha2mla), or use the code that "
                "lies beside the weights: from_pretrained(..., trust_remote_code=True) in a process that does not "
                "import mha2mla."
            )
        if self.num_nope_key_heads is None:
            self.num_nope_key_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        # save_pretrained adds only the entry of the class it saves; every checkpoint shall load through all of them.
        if not getattr(self, "auto_map", None):
            self.auto_map = {"AutoConfig": f"configuration_{self.model_type}.{type(self).__name__}"} | {
                auto: f"modeling_{self.model_type}.{name}" for auto, name in self.model_names().items()
            }

    @classmethod
    def model_names(cls) -> dict[str, str]:
        """The classes of the family's models, by the Auto class of transformers that finds them."""
        family = cls.__name__.removesuffix("Config")
        return {auto: f"{family}{model}" for auto, model in cls.auto_models.items()}

    @property
    def latent_shape(self) -> LatentShape:
        """The sizes that attention and cache are made of."""
        return LatentShape(**{field.name: getattr(self, field.name) for field in fields(LatentShape)})

    @property
    def qk_head_dim(self) -> int:
        """Dims of an expanded query or key. Its presence also tells `generate` that key and value widths differ."""
        return self.latent_shape.qk_head_dim

    @property
    def latent_cache_dim(self) -> int:
        """Numbers cached per token and layer."""
        return self.latent_shape.width

    @property
    def layer_types(self) -> list[str]:
        """One name per layer, by which `DynamicCache` and `StaticCache` pick the latent cache layers. A property, so
        that it is never serialised and never stale."""
        return [LATENT_LAYER_TYPE] * self.num_hidden_layers

    @layer_types.setter
    def layer_types(self, _: list[str] | None) -> None:
        """Configs of transformers that have such a field set it."""

    def validate_layer_type(self):
        """`layer_types` is derived and always right; upstream's check only knows upstream's names."""

    def validate_architecture(self):
        """Part of `@strict` validation: every message names the field and what it may be."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads != 0:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}).")
        if not 0 <= (self.attention_dropout or 0.0) < 1:
            raise ValueError(f"attention_dropout must be at least 0 and below 1, got {self.attention_dropout}.")
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


def register_auto_classes(config_class: Any, family: dict[str, Any]) -> None:
    """
    Let transformers' Auto classes find a family's models, and checkpoints carry their code.

    Args:
        config_class: Of the family; knows which models it has.
        family (`dict`): The models, by the names of their classes.
    """
    for auto, name in config_class.model_names().items():
        getattr(transformers, auto).register(config_class, family[name])
        family[name].register_for_auto_class(auto)
