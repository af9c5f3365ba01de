"""Llama with Multi-head Latent Attention.

- Everything but attention is Llama's own code; weights outside attention keep Llama's names.
- Per layer: `q_proj` (x -> un-rotated and rotary queries), `kv_a_proj` (x -> latent and rotary keys, what is cached),
  `kv_b_proj` (latent -> un-rotated keys and values), `o_proj`, and the integer buffer `rope_frequencies`.
- No norm on the latent. An un-rotated key needs no bias (the softmax does not feel it) and a value bias is one of
  `o_proj`, so `kv_b_proj` has none.
- Training and prefill expand keys and values and go through transformers' attention interface; a decoding step works
  on the cache as it lies (absorbed) where that costs fewer operations.
"""

from torch import nn
from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.arcee.modeling_arcee import ArceeMLP
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_mla_llama import MLALlamaConfig
from .latent_config import register_auto_classes
from .latent_generation import LatentGenerationMixin
from .latent_module import LatentModelMixin, MultiHeadLatentAttention
from .latent_norm import FusedNormMixin
from .latent_rotary import RotaryTableMixin


class MLALlamaRMSNorm(FusedNormMixin, LlamaRMSNorm): ...


class MLALlamaRotaryEmbedding(RotaryTableMixin, LlamaRotaryEmbedding): ...


class MLALlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: MLALlamaConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # LlamaDecoderLayer.__init__ would build Llama's attention
        self.hidden_size = config.hidden_size
        self.self_attn = MultiHeadLatentAttention(config, layer_idx)
        self.mlp = LlamaMLP(config) if config.gated_mlp else ArceeMLP(config)
        self.input_layernorm = MLALlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MLALlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MLALlamaPreTrainedModel(LatentModelMixin, LlamaPreTrainedModel):
    config: MLALlamaConfig
    config_class = MLALlamaConfig
    _no_split_modules = ["MLALlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": MLALlamaDecoderLayer, "attentions": MultiHeadLatentAttention}

    def __init__(self, config: MLALlamaConfig):
        super().__init__(config)
        # The heads find their decoder by AutoModel, and the config may come from another copy of its file, as
        # transformers loads the code of a checkpoint.
        AutoModel.register(type(config), MLALlamaModel, exist_ok=True)


class MLALlamaModel(MLALlamaPreTrainedModel, LlamaModel):
    """Llama's decoder with latent attention. `forward` is Llama's: it hands every layer the full rotary table, from
    which the layer picks its own frequencies."""

    def __init__(self, config: MLALlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel.__init__ would build Llama's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MLALlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MLALlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MLALlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MLALlamaForCausalLM(LatentGenerationMixin, MLALlamaPreTrainedModel, LlamaForCausalLM):
    """
    Causal language model with latent attention; `forward` (logits_to_keep, num_items_in_batch, ...) is Llama's.

    Adapters: `LoraConfig(target_modules=["q_proj", "kv_a_proj", "kv_b_proj", "o_proj"])`, which is peft's default for
    this model once `mha2mla.modeling` is imported. Names that are not here (k_proj, v_proj) peft ignores in silence.
    """

    def __init__(self, config: MLALlamaConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MLALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MLALlamaForQuestionAnswering(GenericForQuestionAnswering, MLALlamaPreTrainedModel): ...


class MLALlamaForSequenceClassification(GenericForSequenceClassification, MLALlamaPreTrainedModel): ...


class MLALlamaForTokenClassification(GenericForTokenClassification, MLALlamaPreTrainedModel): ...


register_auto_classes(MLALlamaConfig, globals())
