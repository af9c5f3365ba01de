"""Models of known dimensions with random weights: speed depends on no others."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mha2mla.modeling import FAMILIES

DIMENSIONS: dict[str, dict[str, Any]] = {
    "llama-2-7b": dict(
        model_type="llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "llama-2-70b": dict(
        model_type="llama",
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "llama-3-8b": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "mixtral-8x7b": dict(
        model_type="mixtral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "olmo-2-7b": dict(
        model_type="olmo2",
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "qwen3-8b": dict(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=65536,
    ),
    "smollm2-135m": dict(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "pico": dict(
        model_type="llama",
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=4096,
    ),
}


def random_models(
    name: str, dtype: torch.dtype, device: str, rank: int, rope_dim: int, num_rope_key_heads: int
) -> dict[str, Callable[[], PreTrainedModel]]:
    """Makers of the original and the converted model of these [`DIMENSIONS`] with random weights, one at a time."""
    if name not in DIMENSIONS:
        raise ValueError(f"Dimensions are known for {', '.join(DIMENSIONS)}, not for {name!r}.")
    sizes = {field: size for field, size in DIMENSIONS[name].items() if field != "model_type"}
    model_type = DIMENSIONS[name]["model_type"]
    converted = FAMILIES[f"mla_{model_type}"]
    latent = dict(kv_lora_rank=rank, qk_rope_head_dim=rope_dim, num_rope_key_heads=num_rope_key_heads)
    latent |= dict(qk_nope_head_dim=sizes["head_dim"], v_head_dim=sizes["head_dim"])

    def make(config, model_class) -> PreTrainedModel:
        torch.manual_seed(0)
        with torch.device(device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return model_class(config).eval()
            finally:
                torch.set_default_dtype(default)

    return {
        "original": lambda: make(AutoConfig.for_model(model_type, **sizes), AutoModelForCausalLM.from_config),
        "converted": lambda: make(converted.config_class(**sizes, **latent), converted),
    }
