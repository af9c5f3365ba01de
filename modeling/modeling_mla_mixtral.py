"""Mixtral with Multi-head Latent Attention: everything but attention is Mixtral's own code, and attention is that of
every family here. Experts are stored as they are in memory, those of a layer in two tensors."""

from torch import nn
from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralSparseMoeBlock,
)

from .configuration_mla_mixtral import MLAMixtralConfig
from .latent_config import register_auto_classes
from .latent_generation import LatentGenerationMixin
from .latent_module import LatentModelMixin, MultiHeadLatentAttention
from .latent_norm import FusedNormMixin
from .latent_rotary import RotaryTableMixin


class MLAMixtralRMSNorm(FusedNormMixin, MixtralRMSNorm): ...


class MLAMixtralRotaryEmbedding(RotaryTableMixin, MixtralRotaryEmbedding): ...


class MLAMixtralDecoderLayer(MixtralDecoderLayer):
    def __init__(self, config: MLAMixtralConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # MixtralDecoderLayer.__init__ would build Mixtral's attention
        self.hidden_size = config.hidden_size
        self.self_attn = MultiHeadLatentAttention(config, layer_idx)
        self.mlp = MixtralSparseMoeBlock(config)
        self.input_layernorm = MLAMixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MLAMixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MLAMixtralPreTrainedModel(LatentModelMixin, MixtralPreTrainedModel):
    config: MLAMixtralConfig
    config_class = MLAMixtralConfig
    _no_split_modules = ["MLAMixtralDecoderLayer"]
    _can_record_outputs = {
        **MixtralPreTrainedModel._can_record_outputs,  # of the router
        "hidden_states": MLAMixtralDecoderLayer,
        "attentions": MultiHeadLatentAttention,
    }

    def __init__(self, config: MLAMixtralConfig):
        super().__init__(config)
        AutoModel.register(type(config), MLAMixtralModel, exist_ok=True)  # as MLALlamaPreTrainedModel does


class MLAMixtralModel(MLAMixtralPreTrainedModel, MixtralModel):
    """Mixtral's decoder with latent attention. `forward` is Mixtral's: it hands every layer the full table, from
    which the layer picks its own frequencies."""

    def __init__(self, config: MLAMixtralConfig):
        MixtralPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MLAMixtralDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MLAMixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MLAMixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MLAMixtralForCausalLM(LatentGenerationMixin, MLAMixtralPreTrainedModel, MixtralForCausalLM):
    """Causal language model with latent attention; `forward` (output_router_logits, logits_to_keep, ...) is Mixtral's.
    Adapters are those of [`MLALlamaForCausalLM`]."""

    def __init__(self, config: MLAMixtralConfig):
        MixtralPreTrainedModel.__init__(self, config)
        self.model = MLAMixtralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


class MLAMixtralForQuestionAnswering(GenericForQuestionAnswering, MLAMixtralPreTrainedModel): ...


class MLAMixtralForSequenceClassification(GenericForSequenceClassification, MLAMixtralPreTrainedModel): ...


class MLAMixtralForTokenClassification(GenericForTokenClassification, MLAMixtralPreTrainedModel): ...


register_auto_classes(MLAMixtralConfig, globals())
