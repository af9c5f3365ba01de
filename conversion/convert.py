"""A Llama-type checkpoint in, an MLA checkpoint out."""

import json
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.llama.configuration_llama import LlamaConfig

from mha2mla.common.companions import copy_companions
from mha2mla.common.scratch import scratch_folder
from mha2mla.common.text import load_blocks
from mha2mla.common.tokenizer import write_tokenizer
from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM

from .checkpoint import RECORD_NAME, CheckpointReader, CheckpointWriter, atomic_folder, check_output
from .config import CachePlan, ConversionConfig, plan_caches
from .model_card import write_model_card
from .pipeline import ConvertedLayer, calibrated_layers, collect_state, paper_layers, search_split
from .presets.calibrated.state import CalibrationState, fingerprint
from .source import check_tensors, head_dim, load_config, local_checkpoint
from .weights_check import check_weights, is_tied

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
    start = time.perf_counter()
    output = Path(output)
    check_output(output, options.overwrite)
    with local_checkpoint(source, revision, gguf_file) as folder:
        config = load_config(folder)
        reader = CheckpointReader(folder)
        check_tensors(reader)
        check_weights(reader, config)
        config.tie_word_embeddings = is_tied(reader, config, "model.embed_tokens.weight", "lm_head.weight")
        plans = plan_caches(options, config)
        dtype = output_dtype(options, reader)
        logger.info(plans[0].describe(dtype.itemsize))
        blocks = load_text(folder, options)
        with (
            atomic_folder(output, options.overwrite) as partial,
            converted_layers(reader, config, options, plans, blocks) as (plan, layers),
        ):
            logger.info(
                "Rotary keys %d x %d, latent %d", plan.num_rope_key_heads, plan.qk_rope_head_dim, plan.kv_lora_rank
            )
            mla_config = make_config(config, options, plan, reader, dtype)
            records = write_weights(partial, reader, config, mla_config, options, layers)
            write_companions(partial, folder, mla_config)
            versions = {name: version(name) for name in PACKAGES}
            record = {
                "source": source,
                "revision": folder.name if folder.parent.name == "snapshots" else revision,
                "gguf_file": gguf_file,
                "options": asdict(options),
                "kv_lora_rank": plan.kv_lora_rank,
                "qk_rope_head_dim": plan.qk_rope_head_dim,
                "num_rope_key_heads": plan.num_rope_key_heads,
                "cache_width": plan.width,
                "source_cache_width": plan.source_width,
                "seconds": round(time.perf_counter() - start, 1),
                "versions": versions | {"python": platform.python_version()},
                "layers": records,
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
    config: PreTrainedConfig,
    options: ConversionConfig,
    plan: CachePlan,
    reader: CheckpointReader,
    dtype: torch.dtype,
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
        # `calibrated` keeps all dims in un-rotated queries: a pair may be rotated in one component and not in others.
        qk_nope_head_dim=head_dim(config) - (plan.qk_rope_head_dim if options.preset == "paper" else 0),
        v_head_dim=head_dim(config),
        num_rope_key_heads=plan.num_rope_key_heads,
        num_nope_key_heads=config.num_key_value_heads if options.preset == "paper" else config.num_attention_heads,
    )


def load_text(folder: Path, options: ConversionConfig) -> torch.Tensor | None:
    """Calibration blocks [samples, length], if the options ask for text at all."""
    if not options.needs_calibration:
        return None
    assert options.calibration_data is not None
    return load_blocks(
        folder,
        options.calibration_data,
        options.calibration_samples,
        options.calibration_length,
        options.calibration_column,
        options.calibration_subset,
        options.calibration_split,
        options.seed,
    )


@contextmanager
def converted_layers(
    reader: CheckpointReader,
    config: PreTrainedConfig,
    options: ConversionConfig,
    plans: list[CachePlan],
    blocks: torch.Tensor | None,
) -> Iterator[tuple[CachePlan, Iterator[ConvertedLayer]]]:
    """The plan that was chosen, and the converted layers one by one."""
    if options.preset == "paper":
        yield plans[0], paper_layers(reader, config, options, plans[0], blocks)
        return
    assert blocks is not None
    identity = fingerprint(config, blocks, options.score_samples, options.shared_key)
    with scratch_folder("mha2mla-calibration-") as temporary:
        state = CalibrationState(Path(options.calibration_state or temporary), identity)
        collect_state(reader, config, options, blocks, state)
        plan = search_split(reader, config, options, blocks, state, plans)
        yield plan, calibrated_layers(reader, config, options, plan, blocks, state)


def write_weights(
    output: Path,
    reader: CheckpointReader,
    config: PreTrainedConfig,
    mla_config: MLALlamaConfig,
    options: ConversionConfig,
    layers: Iterator[ConvertedLayer],
) -> list[dict]:
    """Write layer by layer; whatever is not attention is passed on. Returns what the record says of each layer."""
    writer = CheckpointWriter(output, convert_file_size_to_int(options.max_shard_size))
    dtype = mla_config.dtype
    writer.add("model.embed_tokens.weight", reader.get("model.embed_tokens.weight").to(dtype))
    records = []
    for index, converted in enumerate(layers):
        prefix = f"model.layers.{index}."
        for name in reader.names(prefix):
            if not name.startswith("self_attn."):
                writer.add(prefix + name, reader.get(prefix + name).to(dtype))
        for name, tensor in converted.attention.state_dict(dtype).items():
            writer.add(f"{prefix}self_attn.{name}", tensor)
        frequencies = converted.attention.rope_frequencies.tolist()
        records.append({"rope_frequencies": frequencies, **converted.metrics})
    writer.add("model.norm.weight", reader.get("model.norm.weight").to(dtype))
    if not config.tie_word_embeddings:
        writer.add("lm_head.weight", reader.get("lm_head.weight").to(dtype))
    writer.finish()
    check_complete(writer, mla_config)
    return records


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
    copy_companions(folder, output)
    write_tokenizer(folder, output)
