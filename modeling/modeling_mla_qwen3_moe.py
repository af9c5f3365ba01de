"""Qwen3's mixtures of experts with Multi-head Latent Attention behind the norms of queries and keys
(`latent_qk_norm.py`). Everything but attention is Qwen3's own code; experts are stored as they are in memory, those of
a layer in two tensors."""

from torch import nn
from transformers import AutoModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
)

from .configuration_mla_qwen3_moe import MLAQwen3MoeConfig
from .latent_config import register_auto_classes
from .latent_generation import LatentGenerationMixin
from .latent_module import LatentModelMixin
from .latent_norm import FusedNormMixin
from .latent_qk_norm import NormalisedLatentAttention
from .latent_rotary import RotaryTableMixin


class MLAQwen3MoeRMSNorm(FusedNormMixin, Qwen3MoeRMSNorm): ...


class MLAQwen3MoeRotaryEmbedding(RotaryTableMixin, Qwen3MoeRotaryEmbedding): ...


class MLAQwen3MoeDecoderLayer(Qwen3MoeDecoderLayer):
    def __init__(self, config: MLAQwen3MoeConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)  # Qwen3MoeDecoderLayer.__init__ would build Qwen3's attention
        self.hidden_size = config.hidden_size
        self.self_attn = NormalisedLatentAttention(config, layer_idx, MLAQwen3MoeRMSNorm, per_head=True)
        dense = layer_idx in config.mlp_only_layers or (layer_idx + 1) % config.decoder_sparse_step != 0
        self.mlp = Qwen3MoeMLP(config, config.intermediate_size) if dense else Qwen3MoeSparseMoeBlock(config)
        self.input_layernorm = MLAQwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MLAQwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MLAQwen3MoePreTrainedModel(LatentModelMixin, Qwen3MoePreTrainedModel):
    config: MLAQwen3MoeConfig
    config_class = MLAQwen3MoeConfig
    _no_split_modules = ["MLAQwen3MoeDecoderLayer"]
    _can_record_outputs = {
        **Qwen3MoePreTrainedModel._can_record_outputs,  # of the router
        "hidden_states": MLAQwen3MoeDecoderLayer,
        "attentions": NormalisedLatentAttention,
    }

    def __init__(self, config: MLAQwen3MoeConfig):
        super().__init__(config)
        AutoModel.register(type(config), MLAQwen3MoeModel, exist_ok=True)  # as MLALlamaPreTrainedModel does


class MLAQwen3MoeModel(MLAQwen3MoePreTrainedModel, Qwen3MoeModel):
    """Qwen3's decoder with latent attention and experts; `forward` is Qwen3's."""

    def __init__(self, config: MLAQwen3MoeConfig):
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MLAQwen3MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MLAQwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MLAQwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MLAQwen3MoeForCausalLM(LatentGenerationMixin, MLAQwen3MoePreTrainedModel, Qwen3MoeForCausalLM):
    """Causal language model with latent attention; `forward` (output_router_logits, ...) is Qwen3's."""

    def __init__(self, config: MLAQwen3MoeConfig):
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.model = MLAQwen3MoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


class MLAQwen3MoeForQuestionAnswering(GenericForQuestionAnswering, MLAQwen3MoePreTrainedModel): ...


class MLAQwen3MoeForSequenceClassification(GenericForSequenceClassification, MLAQwen3MoePreTrainedModel): ...


class MLAQwen3MoeForTokenClassification(GenericForTokenClassification, MLAQwen3MoePreTrainedModel): ...


register_auto_classes(MLAQwen3MoeConfig, globals())
