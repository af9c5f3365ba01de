"""OLMo 2 with Multi-head Latent Attention behind the norms of queries and keys (`latent_qk_norm.py`).

Everything but attention is OLMo 2's own code, and weights outside attention keep OLMo 2's names.
"""

from torch import nn
from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2DecoderLayer,
    Olmo2ForCausalLM,
    Olmo2MLP,
    Olmo2Model,
    Olmo2PreTrainedModel,
    Olmo2RMSNorm,
    Olmo2RotaryEmbedding,
)

from .configuration_mla_olmo2 import MLAOlmo2Config
from .latent_config import register_auto_classes
from .latent_generation import LatentGenerationMixin
from .latent_module import LatentModelMixin
from .latent_norm import FusedNormMixin
from .latent_qk_norm import NormalisedLatentAttention
from .latent_rotary import RotaryTableMixin


class MLAOlmo2RMSNorm(FusedNormMixin, Olmo2RMSNorm): ...


class MLAOlmo2RotaryEmbedding(RotaryTableMixin, Olmo2RotaryEmbedding): ...


class MLAOlmo2DecoderLayer(Olmo2DecoderLayer):
    def __init__(self, config: MLAOlmo2Config, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # Olmo2DecoderLayer.__init__ would build OLMo 2's attention
        self.hidden_size = config.hidden_size
        self.self_attn = NormalisedLatentAttention(config, layer_idx, MLAOlmo2RMSNorm, per_head=False)
        self.mlp = Olmo2MLP(config)
        self.post_attention_layernorm = MLAOlmo2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = MLAOlmo2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MLAOlmo2PreTrainedModel(LatentModelMixin, Olmo2PreTrainedModel):
    config: MLAOlmo2Config
    config_class = MLAOlmo2Config
    _no_split_modules = ["MLAOlmo2DecoderLayer"]
    _can_record_outputs = {"hidden_states": MLAOlmo2DecoderLayer, "attentions": NormalisedLatentAttention}

    def __init__(self, config: MLAOlmo2Config):
        super().__init__(config)
        AutoModel.register(type(config), MLAOlmo2Model, exist_ok=True)  # as MLALlamaPreTrainedModel does


class MLAOlmo2Model(MLAOlmo2PreTrainedModel, Olmo2Model):
    """OLMo 2's decoder with latent attention; `forward` is its own."""

    def __init__(self, config: MLAOlmo2Config):
        Olmo2PreTrainedModel.__init__(self, config)  # Olmo2Model.__init__ would build OLMo 2's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MLAOlmo2DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MLAOlmo2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MLAOlmo2RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MLAOlmo2ForCausalLM(LatentGenerationMixin, MLAOlmo2PreTrainedModel, Olmo2ForCausalLM):
    """Causal language model with latent attention; `forward` is OLMo 2's."""

    def __init__(self, config: MLAOlmo2Config):
        Olmo2PreTrainedModel.__init__(self, config)
        self.model = MLAOlmo2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MLAOlmo2ForQuestionAnswering(GenericForQuestionAnswering, MLAOlmo2PreTrainedModel): ...


class MLAOlmo2ForSequenceClassification(GenericForSequenceClassification, MLAOlmo2PreTrainedModel): ...


class MLAOlmo2ForTokenClassification(GenericForTokenClassification, MLAOlmo2PreTrainedModel): ...


register_auto_classes(MLAOlmo2Config, globals())
