"""What cannot be converted, each with the field that says so and what to do instead."""

from typing import NoReturn

from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.modeling import FAMILIES

from ..checkpoint import TensorSource
from ..rotary import head_dim, num_rotary_pairs

# What else a config may say, and why that cannot be converted; the first that holds is told.
UNSUPPORTED_FIELDS = {
    "kv_lora_rank": "the model has latent attention already, and its cache is small as it is",
    "text_config": "it is a model of more than text. Save its language model by itself, and give that",
    "attn_logit_softcapping": "its scores are capped before the softmax, and those of latent attention are not",
    "sliding_window": "most of its layers attend within a window, which bounds their caches already",
    "num_local_experts": "its experts are of another kind than Mixtral's and Qwen3's",
    "num_experts": "its experts are of another kind than Mixtral's and Qwen3's",
    "n_routed_experts": "its experts are of another kind than Mixtral's and Qwen3's",
}
# What no field says.
UNSUPPORTED_MODEL_TYPES = {
    "gpt_oss": "each head has an attention sink, a weight of its own in the softmax, and latent attention has none"
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")


def refuse_model_type(config: PreTrainedConfig, supported: tuple[str, ...]) -> NoReturn:
    """Raise the `ValueError` for a model type that no architecture accepts."""
    model_type = config.model_type
    if model_type in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}: this checkpoint has been converted already. Give its source.")
    reason = unsupported(config)
    raise ValueError(
        f"model_type={model_type!r} is not supported{'' if reason is None else f' ({reason})'}; it must be one of "
        f"{', '.join(supported)}."
    )


def unsupported(config: PreTrainedConfig) -> str | None:
    """What makes a model of such a type one that cannot be converted, if it is known: field, value and reason."""
    if config.model_type in UNSUPPORTED_MODEL_TYPES:
        return UNSUPPORTED_MODEL_TYPES[config.model_type]
    for field in ("layer_types", "layers_block_type"):
        others = sorted(set(getattr(config, field, None) or ()) - set(ATTENTION_LAYERS))
        if others:
            return f"{field} has {others[0]!r}: such layers keep a state, and have no keys and values to compress"
    for field, reason in UNSUPPORTED_FIELDS.items():
        value = getattr(config, field, None)
        if value:
            return f"{field}={value}: {reason}" if isinstance(value, int | float) else f"{field}: {reason}"
    return None


def refuse_empty_sizes(config: PreTrainedConfig) -> None:
    for field in SIZES:
        value = getattr(config, field, None)
        if value is not None and value < 1:
            raise ValueError(f"{field}={value} must be at least 1. Mend config.json.")


def refuse_experts(config: PreTrainedConfig) -> None:
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, field, None):
            raise ValueError(
                f"{field}={getattr(config, field)}: mixture-of-experts models are not supported. Use a dense model, "
                "for example of model_type 'llama'."
            )


def refuse_sliding_window(config: PreTrainedConfig) -> None:
    """A window that no text of the model's length reaches, or that no layer has, is none."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    used = layers is None or "sliding_attention" in layers
    if window is not None and used and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window={window}: a window bounds the cache already, and the converted model "
            "would not keep it. If the model never meets longer texts, set sliding_window to null in its config.json."
        )


def refuse_quantised_weights(config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config: the weights are quantised. De-quantise and save them first "
            "(from_pretrained(...).dequantize().save_pretrained(folder), and the tokenizer likewise), or give the "
            "original."
        )


def refuse_partial_rotation(config: PreTrainedConfig) -> None:
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise ValueError(
            f"rope_parameters.partial_rotary_factor={factor}: transformers' {config.model_type!r} rotates whole "
            "heads. Set it to 1 if that is what is meant."
        )


def refuse_odd_heads(config: PreTrainedConfig) -> None:
    if head_dim(config) % 2 != 0:
        raise ValueError(f"head_dim={head_dim(config)} must be even for rotary embeddings.")
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if int(head_dim(config) * factor) % 2 != 0:
        raise ValueError(
            f"rope_parameters.partial_rotary_factor={factor} rotates {int(head_dim(config) * factor)} dims of a head, "
            "which must be even."
        )


def refuse_rotary_tables(config: PreTrainedConfig) -> None:
    """Of which transformers makes infinite frequencies, or other ones than it says, with a line in the log at most."""
    parameters, pairs = config.rope_parameters, num_rotary_pairs(config)
    for field in ("short_factor", "long_factor"):
        factors = parameters.get(field)
        if factors is not None and len(factors) != pairs:
            raise ValueError(f"rope_parameters.{field} has {len(factors)} factors for {pairs} rotary pairs of a head.")
    try:
        frequencies = LlamaRotaryEmbedding(config).inv_freq
    except Exception as error:  # whatever malformed parameters make of transformers and torch
        raise ValueError(
            f"rope_parameters={parameters} make no rotary table ({error!r}). Mend config.json."
        ) from error
    if not (frequencies.isfinite() & (frequencies > 0)).all():
        raise ValueError(f"rope_parameters={parameters} make frequencies of 0, infinity or NaN. Mend config.json.")


def refuse_normalised_heads(tensors: TensorSource, prefix: str) -> None:
    """For weights of the attention, named from `prefix` on, that an unsuspicious config does not tell of."""
    for name in ("q_norm", "k_norm"):
        if f"{prefix}{name}.weight" in tensors:
            raise ValueError(
                f"The checkpoint has self_attn.{name} weights (qk-norm), of which its model_type does not tell. Give "
                "its config.json the right one, for example 'qwen3'."
            )
