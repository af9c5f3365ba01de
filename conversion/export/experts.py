"""Mixtral's experts as DeepSeek-V2's: softmax over all, the k best, renormalised; the one that is always on is zero.

Engines and DeepSeek's own code do what such a config says. transformers' DeepSeek-V2 does not renormalise, whatever
`norm_topk_prob` says, and its DeepSeek-V3 has sigmoids; what it calls Mistral 4 is DeepSeek's attention before this
very router, and the export is checked with it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, Mistral4Config, Mistral4ForCausalLM, PreTrainedConfig

NOT_FOR_TRANSFORMERS = (
    "Not for transformers' own DeepSeek-V2, which does not renormalise the weights of the chosen experts "
    "(norm_topk_prob) and gives other text: serve it by vLLM, and in transformers use the model that it was "
    "exported from"
)
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether one of our models has experts."""
    return bool(getattr(config, "num_local_experts", None))


def expert_fields(config: Any) -> dict[str, Any]:
    """What DeepSeek-V2's config says of the experts of our model."""
    return dict(
        first_k_dense_replace=0,
        moe_layer_freq=1,
        n_routed_experts=config.num_local_experts,
        n_shared_experts=1,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.intermediate_size,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )


def single_experts(name: str, fused: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weights of each expert, as DeepSeek's checkpoints have them, of one of the [`FUSED`] tensors, whose
    first dim counts experts."""
    parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    for index, expert in enumerate(fused):
        for part, weight in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"mlp.experts.{index}.{part}.weight", weight


def shared_expert(config: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The expert that is always on, of zeros: a config cannot say that there is none (it must be an integer), and
    engines do not bear 0 (vLLM 0.32 on a CPU divides by it)."""
    rows = torch.zeros(config.intermediate_size, config.hidden_size, dtype=dtype)
    for part, weight in {"gate_proj": rows, "up_proj": rows.clone(), "down_proj": torch.zeros_like(rows.T)}.items():
        yield f"mlp.shared_experts.{part}.weight", weight.contiguous()


def reference_config(stock: PreTrainedConfig) -> PreTrainedConfig:
    """The config by which transformers computes what engines compute with the stock one."""
    if not isinstance(stock, DeepseekV2Config):
        return stock
    values = stock.to_dict()
    for name in ("model_type", "architectures", "rope_parameters", "head_dim", "auto_map"):
        values.pop(name, None)
    rope = {"llama_4_scaling_beta": 0.0, **stock.rope_parameters}
    rope["partial_rotary_factor"] = stock.qk_rope_head_dim / (stock.qk_nope_head_dim + stock.qk_rope_head_dim)
    if rope["rope_type"] == "default":  # which takes whole heads
        rope |= {
            "rope_type": "yarn",
            "factor": 1.0,
            "original_max_position_embeddings": stock.max_position_embeddings,
        }
    return Mistral4Config(**values, rope_parameters=rope, rope_interleave=True)


def causal_model(config: PreTrainedConfig, **kwargs: Any) -> Any:
    """A model of the config; transformers' Auto class does not know that Mistral 4 has one without images."""
    if isinstance(config, Mistral4Config):
        return Mistral4ForCausalLM._from_config(config, **kwargs)
    return AutoModelForCausalLM.from_config(config, **kwargs)
