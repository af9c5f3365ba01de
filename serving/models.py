"""Our families as vLLM's models: all but attention is its own Llama, and its own experts where a family has them. The
norms of OLMo 2 stand elsewhere."""

from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.mixtral import MixtralMoE
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from .attention import JointlyNormalisedLatentAttention, LatentAttention, NormalisedLatentAttention


class LatentModel(LlamaModel):
    """Llama's, whose queries, keys and values are not stacked."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
    )


class MLALlamaForCausalLM(LlamaForCausalLM):
    """Llama and what converts to it: Mistral, Qwen2 and others."""

    hf_to_vllm_mapper = LatentModel.hf_to_vllm_mapper
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    backbone, layer, attention = LatentModel, LlamaDecoderLayer, LatentAttention

    def _init_model(self, vllm_config: Any, prefix: str = "", **_: Any) -> LatentModel:
        if vllm_config.lora_config is not None:
            raise ValueError(
                "Adapters have the checkpoint's sizes, and its weights are padded here: serve a merged model "
                "(mha2mla train --merge), without --enable-lora."
            )
        layer = partial(self.layer, attn_layer_type=self.attention)
        return self.backbone(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class MLAQwen3ForCausalLM(MLALlamaForCausalLM):
    attention = NormalisedLatentAttention


class MixtralDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config, prefix, **kwargs)
        config = vllm_config.model_config.hf_config
        self.mlp = MixtralMoE(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )


class MixtralLatentModel(LatentModel):
    """Experts of a layer are stored in two tensors, which vLLM's Mixtral calls by other names."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".experts.gate_up_proj": ".experts.w13", ".experts.down_proj": ".experts.w2"}
    )


class MLAMixtralForCausalLM(MLALlamaForCausalLM):
    backbone, layer = MixtralLatentModel, MixtralDecoderLayer


class Qwen3MoeDecoderLayer(LlamaDecoderLayer):
    """Some layers may be dense."""

    def __init__(self, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config, prefix, **kwargs)
        config, index = vllm_config.model_config.hf_config, extract_layer_index(prefix)
        if index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0:
            self.mlp = Qwen3MoeSparseMoeBlock(vllm_config, prefix=f"{prefix}.mlp")


class MLAQwen3MoeForCausalLM(MLAQwen3ForCausalLM):
    layer = Qwen3MoeDecoderLayer


class PostNormDecoderLayer(LlamaDecoderLayer):
    """OLMo 2's: what attention and MLP give is normalised, not what they get."""

    def __init__(self, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config, prefix, **kwargs)
        config = vllm_config.model_config.hf_config
        del self.input_layernorm
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last part of the residual stream is handed on apart, for the next norm to add it."""
        stream = hidden_states if residual is None else hidden_states + residual
        stream = stream + self.post_attention_layernorm(self.self_attn(positions, stream))
        return self.post_feedforward_layernorm(self.mlp(stream)), stream


class MLAOlmo2ForCausalLM(MLALlamaForCausalLM):
    layer, attention = PostNormDecoderLayer, JointlyNormalisedLatentAttention
