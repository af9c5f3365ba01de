"""A Llama-type checkpoint in, an MLA checkpoint out."""

import json
import logging
import platform
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.llama.configuration_llama import LlamaConfig

from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM

from .attention_weights import SourceAttention
from .calibration_data import load_calibration_blocks
from .checkpoint import RECORD_NAME, CheckpointReader, CheckpointWriter, atomic_folder, check_output
from .config import CachePlan, ConversionConfig, plan_cache
from .layerwise import run_layers
from .model_card import write_model_card
from .paper import convert_attention
from .rope_selection import pair_norms, select_by_position, select_by_score, two_norm_scores
from .source import check_tensors, copy_companions, head_dim, load_config, local_checkpoint, rope_attention_scaling

logger = logging.getLogger(__name__)

PACKAGES = ("mha2mla", "torch", "transformers", "safetensors")
# Fields of the source's config that say how it is served or stored, not what it computes.
NOT_INHERITED = ("architectures", "dtype", "head_dim", "attention_bias", "pretraining_tp")


def convert(
    source: str,
    output: str | Path,
    options: ConversionConfig,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> Path:
    """
    Convert a checkpoint and write it as a folder that `from_pretrained(..., trust_remote_code=True)` loads.

    Weights are read and written tensor by tensor; memory holds a layer, a shard of the output, and the activations of
    the calibration text.

    Args:
        source (`str`): Local folder, .gguf file, or name on the Hub.
        output (`str` or `Path`): Folder to write; it appears only once it is complete.
        options (`ConversionConfig`): What to do.
        revision (`str`, *optional*): Branch, tag or commit of a source on the Hub.
        gguf_file (`str`, *optional*): Name of a GGUF file in the source.

    Returns:
        The output folder.

    Raises:
        ValueError: If the source cannot be converted or the options do not fit it; nothing is written then.
    """
    output = Path(output)
    check_output(output, options.overwrite)
    with local_checkpoint(source, revision, gguf_file) as folder:
        config = load_config(folder)
        reader = CheckpointReader(folder)
        check_tensors(reader)
        plan = plan_cache(options, config)
        dtype = output_dtype(options, reader)
        logger.info(plan.describe(dtype.itemsize))

        rope_pairs = choose_rope_pairs(folder, reader, config, options, plan)
        mla_config = make_config(config, plan, reader, dtype)
        with atomic_folder(output, options.overwrite) as partial:
            write_weights(partial, reader, config, mla_config, options, plan, rope_pairs, dtype)
            write_companions(partial, folder, mla_config)
            versions = {name: version(name) for name in PACKAGES}
            record = {
                "source": source,
                "revision": folder.name if folder.parent.name == "snapshots" else revision,
                "gguf_file": gguf_file,
                "options": asdict(options),
                "kv_lora_rank": plan.kv_lora_rank,
                "qk_rope_head_dim": plan.qk_rope_head_dim,
                "cache_ratio": plan.ratio,
                "rope_frequencies": [pairs.tolist() for pairs in rope_pairs],
                "versions": versions | {"python": platform.python_version()},
            }
            (partial / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
            is_repo = not Path(source).exists()
            write_model_card(partial / "README.md", source, is_repo, output.name, options, plan, versions)
    logger.info("Wrote %s", output)
    return output


def output_dtype(options: ConversionConfig, reader: CheckpointReader) -> torch.dtype:
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return reader.get("model.norm.weight").dtype


def make_config(
    config: PreTrainedConfig, plan: CachePlan, reader: CheckpointReader, dtype: torch.dtype
) -> MLALlamaConfig:
    """The converted model's config: the source's Llama fields, and the sizes of the plan."""
    inherited = {field.name for field in fields(LlamaConfig)} - set(NOT_INHERITED)
    values = {name: value for name, value in config.to_dict().items() if name in inherited}
    prefix = "model.layers.0.self_attn."
    return MLALlamaConfig(
        **values,
        head_dim=head_dim(config),
        dtype=dtype,
        architectures=["MLALlamaForCausalLM"],
        attention_bias=any(f"{prefix}{name}_proj.bias" in reader for name in "qkvo"),
        kv_lora_rank=plan.kv_lora_rank,
        qk_rope_head_dim=plan.qk_rope_head_dim,
        qk_nope_head_dim=head_dim(config) - plan.qk_rope_head_dim,
        v_head_dim=head_dim(config),
        num_rope_key_heads=plan.num_rope_key_heads,
        num_nope_key_heads=config.num_key_value_heads,
    )


def choose_rope_pairs(
    folder: Path, reader: CheckpointReader, config: PreTrainedConfig, options: ConversionConfig, plan: CachePlan
) -> list[torch.Tensor]:
    """Pairs that keep RoPE in each layer, a list of [G, r/2]."""
    num_kept, num_pairs = plan.qk_rope_head_dim // 2, head_dim(config) // 2
    if not options.needs_calibration:
        pairs = select_by_position(options.rope_selection, num_kept, num_pairs)
        return [pairs.repeat(config.num_key_value_heads, 1)] * config.num_hidden_layers
    assert options.calibration_data is not None
    blocks = load_calibration_blocks(
        folder,
        options.calibration_data,
        options.calibration_samples,
        options.calibration_length,
        options.calibration_column,
        options.calibration_subset,
        options.calibration_split,
        options.seed,
    )
    chosen = []
    for layer, states in run_layers(reader, config, blocks, options.device):
        query_norms = torch.zeros((), device=options.device)
        key_norms = torch.zeros((), device=options.device)
        for state in states:
            x = layer.input_layernorm(state.to(options.device))[0]  # [tokens, hidden]
            queries = layer.self_attn.q_proj(x).unflatten(-1, (-1, 2 * num_pairs))  # [tokens, H, d]
            keys = layer.self_attn.k_proj(x).unflatten(-1, (-1, 2 * num_pairs))
            query_norms = query_norms + pair_norms(queries).mean(0)
            key_norms = key_norms + pair_norms(keys).mean(0)
        chosen.append(select_by_score(two_norm_scores(query_norms, key_norms), num_kept).cpu())
    return chosen


def write_weights(
    output: Path,
    reader: CheckpointReader,
    config: PreTrainedConfig,
    mla_config: MLALlamaConfig,
    options: ConversionConfig,
    plan: CachePlan,
    rope_pairs: list[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Convert and write layer by layer; whatever is not attention is passed on."""
    writer = CheckpointWriter(output, convert_file_size_to_int(options.max_shard_size))
    scaling = rope_attention_scaling(config)
    writer.add("model.embed_tokens.weight", reader.get("model.embed_tokens.weight").to(dtype))
    for index in tqdm(range(config.num_hidden_layers), desc="Converting", unit="layer"):
        prefix = f"model.layers.{index}."
        attention: dict[str, torch.Tensor] = {}
        for name, tensor in reader.with_prefix(prefix).items():
            if name.startswith("self_attn."):
                attention[name.removeprefix("self_attn.")] = tensor.to(options.device)
            else:
                writer.add(prefix + name, tensor.to(dtype))
        converted = convert_attention(
            SourceAttention.from_tensors(attention, head_dim(config)),
            rope_pairs[index].to(options.device),
            plan.kv_lora_rank,
            options.svd,
            scaling,
        )
        for name, tensor in converted.state_dict(dtype).items():
            writer.add(f"{prefix}self_attn.{name}", tensor)
    writer.add("model.norm.weight", reader.get("model.norm.weight").to(dtype))
    if not config.tie_word_embeddings:
        writer.add("lm_head.weight", reader.get("lm_head.weight").to(dtype))
    writer.finish()
    check_complete(writer, mla_config)


def check_complete(writer: CheckpointWriter, mla_config: MLALlamaConfig) -> None:
    """What was written is what the model loads, name by name."""
    with torch.device("meta"):
        model = MLALlamaForCausalLM(mla_config)
    expected = set(model.state_dict()) - (
        set(model.all_tied_weights_keys) if mla_config.tie_word_embeddings else set()
    )
    written = {name for shard in writer.shards for name in shard}
    assert written == expected, f"written and expected tensors differ: {sorted(written ^ expected)}"


def write_companions(output: Path, folder: Path, mla_config: MLALlamaConfig) -> None:
    """Config, code, tokenizer and generation config."""
    mla_config.save_pretrained(output)
    with torch.device("meta"):
        custom_object_save(MLALlamaForCausalLM(mla_config), output)
    if not any(name.startswith("tokenizer") for name in copy_companions(folder, output)):
        logger.warning("%s has no tokenizer; the converted checkpoint has none either.", folder)
