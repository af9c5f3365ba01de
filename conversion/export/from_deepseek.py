"""The way back: a dense DeepSeek-V2 or V3 checkpoint with one rotary key as a model of our family.

Everything in the export is undone in reverse, from the checkpoint alone: the norm on the latent is folded where it
does nothing but scale, zero padding is left out, and value heads that are copies of each other become one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.common.exports import EXPORT_RECORD_NAME
from mha2mla.common.files import read_json_object
from mha2mla.common.loading import load_config
from mha2mla.conversion.checkpoint import CheckpointReader
from mha2mla.modeling import MLALlamaConfig

from .deepseek import LATENT_NORM_EPS, SAME_FIELDS

NEUTRAL = 1e-3  # largest relative change of a latent by its norm, beside a constant factor


@dataclass
class Layout:
    """
    What of a checkpoint's sizes is in use, in any layer.

    Attributes:
        latent, nope, value (`torch.Tensor`): Dims that are not padding, bool [R'], [nope'], [v'].
        slots (`torch.Tensor`): Rotary slots, bool [r'/2].
        value_groups, key_groups (`int`): Heads of values and of un-rotated keys that differ.
    """

    latent: torch.Tensor
    nope: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    value_groups: int
    key_groups: int


@dataclass(frozen=True)
class SourceRope:
    """How our family says the rotary table: `head_dim` and `rope_parameters` of the table, a frequency a slot."""

    head_dim: int
    rope_parameters: dict[str, Any]
    frequency_of_slot: dict[int, int]


def load_stock_config(folder: Path, model: str) -> PreTrainedConfig:
    """
    Raises:
        ValueError: If the checkpoint is none of DeepSeek's, or has what our family does not.
    """
    config = load_config(str(folder))
    if config.model_type not in ("deepseek_v2", "deepseek_v3"):
        raise ValueError(
            f"{model} has model_type={config.model_type!r}; format='mla-llama' is the way back from DeepSeek "
            "checkpoints (deepseek_v2, deepseek_v3), as --format deepseek-v3 writes them."
        )
    if config.first_k_dense_replace < config.num_hidden_layers:
        raise ValueError(
            f"first_k_dense_replace={config.first_k_dense_replace} of {config.num_hidden_layers} layers: the others "
            "are mixtures of experts, which do not come back."
        )
    if config.q_lora_rank is not None:
        raise ValueError(f"q_lora_rank={config.q_lora_rank}: our family has no low rank and norm for queries.")
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise ValueError(f"{field}=True: biases are not taken over.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} has quantised weights. De-quantise and save them first.")
    return config


def split_attention(
    tensors: dict[str, torch.Tensor], config: PreTrainedConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_nope [H, nope, D], q_rope [H, 2, r/2, D], latent [R, D], k_rope [2, r/2, D], key and value up-projections
    [H, nope, R] and [H, v, R], output [D, H, v]; float64, the two rows of a rotary pair in the axis of 2."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim

    def pairs(rows: torch.Tensor) -> torch.Tensor:
        if getattr(config, "rope_interleave", True):
            return rows.unflatten(-2, (rope // 2, 2)).transpose(-3, -2)
        return rows.unflatten(-2, (2, rope // 2))

    query = tensors["q_proj.weight"].double().unflatten(0, (heads, nope + rope))
    q_nope, q_rope = query.split([nope, rope], dim=1)
    latent, k_rope = tensors["kv_a_proj_with_mqa.weight"].double().split([config.kv_lora_rank, rope])
    keys, values = (
        tensors["kv_b_proj.weight"]
        .double()
        .unflatten(0, (heads, nope + config.v_head_dim))
        .split([nope, config.v_head_dim], dim=1)
    )
    output = tensors["o_proj.weight"].double().unflatten(1, (heads, config.v_head_dim))
    return q_nope, pairs(q_rope), latent, pairs(k_rope), keys, values, output


def different_heads(heads: torch.Tensor, at_least: int) -> int:
    """The smallest number of groups, `at_least` or more, of neighbours in heads [H, ...] that are equal."""
    count = len(heads)
    for groups in range(at_least, count):
        if count % groups == 0:
            grouped = heads.unflatten(0, (groups, -1))
            if torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
                return groups
    return count


def find_layout(reader: CheckpointReader, config: PreTrainedConfig) -> Layout:
    """
    One pass over the attention weights.

    Raises:
        ValueError: If a layer's norm on latents does more than scale them.
    """
    layout = Layout(
        torch.zeros(config.kv_lora_rank, dtype=torch.bool),
        torch.zeros(config.qk_nope_head_dim, dtype=torch.bool),
        torch.zeros(config.v_head_dim, dtype=torch.bool),
        torch.zeros(config.qk_rope_head_dim // 2, dtype=torch.bool),
        1,
        1,
    )
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        _, _, latent, k_rope, keys, values, _ = split_attention(reader.with_prefix(f"{prefix}self_attn."), config)
        # No input of unit root mean square gives latents beyond this mean square.
        seen = latent * reader.get(f"{prefix}input_layernorm.weight").double()
        most = seen.square().sum().item() * config.hidden_size / config.kv_lora_rank
        if most > 2 * LATENT_NORM_EPS * NEUTRAL:
            raise ValueError(
                f"Layer {index}: the norm on the latents (kv_a_layernorm) may change them by more than a constant "
                "factor, and our family has none. Only checkpoints whose norm does nothing come back, as those that "
                "`mha2mla export` writes."
            )
        layout.latent |= latent.ne(0).any(1)
        layout.slots |= k_rope.ne(0).any(-1).any(0)
        layout.nope |= keys.ne(0).any(-1).any(0)
        layout.value |= values.ne(0).any(-1).any(0)
        layout.value_groups = different_heads(values, layout.value_groups)
        layout.key_groups = different_heads(keys, layout.key_groups)
    # Our key/value heads are those of values; un-rotated keys come by these or by query heads.
    if layout.key_groups not in (layout.value_groups, config.num_attention_heads):
        layout.key_groups = config.num_attention_heads
    return layout


def find_rope(folder: Path, config: PreTrainedConfig, layout: Layout) -> SourceRope:
    """The source's own table where an export's record tells it, else the checkpoint's: equal frequencies."""
    used = layout.slots.nonzero()[:, 0].tolist()
    if (folder / EXPORT_RECORD_NAME).is_file():
        source = read_json_object(folder / EXPORT_RECORD_NAME).get("source")
        if isinstance(source, dict) and "slot_of_frequency" in source:  # else another program's file of that name
            of_slot = {slot: int(frequency) for frequency, slot in source["slot_of_frequency"].items()}
            if set(used) <= set(of_slot):
                return SourceRope(source["head_dim"], source["rope_parameters"], of_slot)
    return SourceRope(config.qk_rope_head_dim, config.rope_parameters, {slot: slot for slot in used})


def our_config(config: PreTrainedConfig, layout: Layout, rope: SourceRope, dtype: torch.dtype) -> MLALlamaConfig:
    values: dict[str, Any] = {name: getattr(config, name) for name in SAME_FIELDS}
    values |= dict(
        architectures=["MLALlamaForCausalLM"],
        dtype=dtype,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        num_key_value_heads=layout.value_groups,
        head_dim=rope.head_dim,
        rope_parameters=rope.rope_parameters,
    )
    return MLALlamaConfig(
        **values,
        kv_lora_rank=int(layout.latent.sum()),
        qk_rope_head_dim=2 * int(layout.slots.sum()),
        qk_nope_head_dim=int(layout.nope.sum()),
        v_head_dim=int(layout.value.sum()),
        num_rope_key_heads=1,
        num_nope_key_heads=layout.key_groups,
    )


def stock_score_factor(rope_parameters: dict[str, Any]) -> float:
    """What DeepSeek multiplies scores by under yarn (`mscale_all_dim`)."""
    all_dim = rope_parameters.get("mscale_all_dim") or 0
    if rope_parameters["rope_type"] == "default" or not all_dim or rope_parameters["factor"] <= 1:
        return 1.0
    return (0.1 * all_dim * math.log(rope_parameters["factor"]) + 1) ** 2


def our_attention(
    tensors: dict[str, torch.Tensor], config: PreTrainedConfig, ours: MLALlamaConfig, layout: Layout, rope: SourceRope
) -> dict[str, torch.Tensor]:
    """One layer's attention as ours, float64 (and the frequencies, int64)."""
    q_nope, q_rope, latent, k_rope, keys, values, output = split_attention(tensors, config)
    # The power of two in the norm's factor goes to the latents, which get their natural size; the rest goes where a
    # factor goes anyway.
    power = 2.0 ** round(-math.log2(math.sqrt(LATENT_NORM_EPS)))
    left = 1 / (math.sqrt(LATENT_NORM_EPS) * power)
    latent = latent * (tensors["kv_a_layernorm.weight"].double() * power)[:, None]
    scale = math.sqrt(rope.head_dim / (config.qk_nope_head_dim + config.qk_rope_head_dim))
    scale *= stock_score_factor(config.rope_parameters)
    cosines = LlamaRotaryEmbedding(config).attention_scaling / LlamaRotaryEmbedding(ours).attention_scaling
    keys, values = keys[:, layout.nope], values[:, layout.value]
    keys = keys[:: len(keys) // layout.key_groups, :, layout.latent]  # [N, nope, R]
    values = values[:: len(values) // layout.value_groups, :, layout.latent]  # [G, v, R]
    query = torch.cat(
        (q_nope[:, layout.nope] * (scale * left), q_rope[:, :, layout.slots].flatten(1, 2) * (scale * cosines**2)),
        dim=1,
    )
    used = layout.slots.nonzero()[:, 0].tolist()
    return {
        "q_proj.weight": query.flatten(0, 1),
        "kv_a_proj.weight": torch.cat((latent[layout.latent], k_rope[:, layout.slots].flatten(0, 1))),
        "kv_b_proj.weight": torch.cat((keys.flatten(0, 1), values.flatten(0, 1))),
        "o_proj.weight": (output[..., layout.value] * left).flatten(1),
        "rope_frequencies": torch.tensor([[rope.frequency_of_slot[slot] for slot in used]]),
    }


def our_tensors(
    reader: CheckpointReader, config: PreTrainedConfig, ours: MLALlamaConfig, layout: Layout, rope: SourceRope
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weights of our model, one by one, as the checkpoint has them where nothing changes."""
    yield "model.embed_tokens.weight", reader.get("model.embed_tokens.weight")
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        attention = our_attention(reader.with_prefix(f"{prefix}self_attn."), config, ours, layout, rope)
        for name, tensor in attention.items():
            yield f"{prefix}self_attn.{name}", tensor
        for name in reader.names(prefix):
            if not name.startswith("self_attn."):
                yield prefix + name, reader.get(prefix + name)
    yield "model.norm.weight", reader.get("model.norm.weight")
    if not config.tie_word_embeddings:
        yield "lm_head.weight", reader.get("lm_head.weight")
