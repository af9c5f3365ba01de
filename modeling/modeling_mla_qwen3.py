"""Qwen3 with Multi-head Latent Attention behind the norms of queries and keys (`latent_qk_norm.py`).

Everything but attention is Qwen3's own code, and weights outside attention keep Qwen3's names.
"""

from torch import nn
from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from .configuration_mla_qwen3 import MLAQwen3Config
from .latent_config import register_auto_classes
from .latent_generation import LatentGenerationMixin
from .latent_module import LatentModelMixin
from .latent_norm import FusedNormMixin
from .latent_qk_norm import NormalisedLatentAttention
from .latent_rotary import RotaryTableMixin


class MLAQwen3RMSNorm(FusedNormMixin, Qwen3RMSNorm): ...


class MLAQwen3RotaryEmbedding(RotaryTableMixin, Qwen3RotaryEmbedding): ...


class MLAQwen3DecoderLayer(Qwen3DecoderLayer):
    def __init__(self, config: MLAQwen3Config, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # Qwen3DecoderLayer.__init__ would build Qwen3's attention
        self.hidden_size = config.hidden_size
        self.self_attn = NormalisedLatentAttention(config, layer_idx, MLAQwen3RMSNorm, per_head=True)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = MLAQwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MLAQwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MLAQwen3PreTrainedModel(LatentModelMixin, Qwen3PreTrainedModel):
    config: MLAQwen3Config
    config_class = MLAQwen3Config
    _no_split_modules = ["MLAQwen3DecoderLayer"]
    _can_record_outputs = {"hidden_states": MLAQwen3DecoderLayer, "attentions": NormalisedLatentAttention}

    def __init__(self, config: MLAQwen3Config):
        super().__init__(config)
        AutoModel.register(type(config), MLAQwen3Model, exist_ok=True)  # as MLALlamaPreTrainedModel does


class MLAQwen3Model(MLAQwen3PreTrainedModel, LlamaModel):
    """Qwen3's decoder with latent attention. `forward` is Llama's: Qwen3's own makes a mask for each of its layer
    types, and there is one here."""

    def __init__(self, config: MLAQwen3Config):
        Qwen3PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MLAQwen3DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MLAQwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MLAQwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MLAQwen3ForCausalLM(LatentGenerationMixin, MLAQwen3PreTrainedModel, Qwen3ForCausalLM):
    """Causal language model with latent attention; `forward` is Qwen3's."""

    def __init__(self, config: MLAQwen3Config):
        Qwen3PreTrainedModel.__init__(self, config)
        self.model = MLAQwen3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MLAQwen3ForQuestionAnswering(GenericForQuestionAnswering, MLAQwen3PreTrainedModel): ...


class MLAQwen3ForSequenceClassification(GenericForSequenceClassification, MLAQwen3PreTrainedModel): ...


class MLAQwen3ForTokenClassification(GenericForTokenClassification, MLAQwen3PreTrainedModel): ...


register_auto_classes(MLAQwen3Config, globals())
