"""One of our models in, what an engine runs out."""

import logging
import time
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from mha2mla.common.companions import copy_companions
from mha2mla.common.exports import EXPORT_RECORD_NAME, without_warning_of_factor
from mha2mla.common.options import shard_bytes
from mha2mla.common.outputs import atomic_folder, check_output, real_path
from mha2mla.common.tokenizer import write_tokenizer
from mha2mla.conversion.cache_plan import served_dtype
from mha2mla.conversion.checkpoint import CheckpointReader, CheckpointWriter
from mha2mla.conversion.fused import open_checkpoint
from mha2mla.conversion.output import check_complete, write_companions
from mha2mla.conversion.source import local_checkpoint
from mha2mla.conversion.weights_check import check_weights, stored_dtype

from .card import write_export_card, write_way_back_card
from .check import check_agreement, check_ids, compare_logits, streamed_logits
from .config import DTYPES, ExportConfig
from .deepseek import stock_config, stock_names, stock_tensors, tiny_gauge
from .engines import engines_by_padding, engines_for
from .experts import NOT_FOR_TRANSFORMERS, has_experts, reference_config
from .from_deepseek import find_layout, find_rope, load_stock_config, our_config, our_tensors
from .gguf import GGUFTensors, atomic_file, big_gauge, check_output_file, check_package, write_gguf
from .gguf_vocab import read_vocabulary
from .plan import advise_padding, load_model_config, plan_export
from .record import write_record
from .rope_table import STEP_NOTE

logger = logging.getLogger(__name__)

RUNNING, CHECKING = "Running the model", "Checking what was written"  # on a short text


def export(
    model: str | Path, output: str | Path, options: ExportConfig | None = None, revision: str | None = None
) -> Path:
    """
    Write one of our models in a form that serving engines run with their own code.

    Args:
        model (`str` or `Path`): Folder or name on the Hub of a converted model, recovered or not. For
            `format="mla-llama"`, of a DeepSeek checkpoint.
        output (`str` or `Path`): Folder to write, or, for `format="gguf"`, file; it appears only once it is complete
            and checked.
        options (`ExportConfig`, *optional*): What to write.
        revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.

    Returns:
        The output.

    Raises:
        ValueError: If the model cannot be said in the format's terms, before any work is done; or if what was written
            does not compute what the model computes. Nothing is left then.
    """
    options, output = options or ExportConfig(), Path(output)
    if output.suffix == ".gguf" and options.format != "gguf":
        raise ValueError(
            f"{output} is named like a file for llama.cpp, and format={options.format!r} writes a folder. Add "
            "--format gguf, or name the folder otherwise."
        )
    if real_path(output) == real_path(Path(model)):
        raise ValueError(f"{output} is the model, which would be lost. Choose another output.")
    with local_checkpoint(str(model), revision) as folder:
        write = {"deepseek-v3": export_deepseek, "gguf": export_gguf, "mla-llama": export_ours}[options.format]
        write(folder, str(model), output, options)
    logger.info("Wrote %s", output)
    return output


def weights_dtype(options: ExportConfig, stored: torch.dtype) -> str:
    """The type to write, by name."""
    name = str(stored).removeprefix("torch.")
    allowed = DTYPES[options.format]
    if options.dtype != "auto":
        return options.dtype
    if name not in allowed:
        logger.warning("Weights are %s; the export has them in %s (--dtype chooses another).", name, allowed[0])
        return allowed[0]
    return name


def export_deepseek(folder: Path, model: str, output: Path, options: ExportConfig) -> None:
    """A stock DeepSeek-V3 checkpoint."""
    start = time.perf_counter()
    check_output(output, options.overwrite, EXPORT_RECORD_NAME)
    config = load_model_config(folder, model)
    reader = CheckpointReader(folder)
    check_weights(reader, config)
    plan = plan_export(folder, config, reader, options, allow_step=True)
    dtype = weights_dtype(options, stored_dtype(reader))
    gauge = tiny_gauge(config.rms_norm_eps)
    with without_warning_of_factor(lambda: True):
        stock = stock_config(config, plan, gauge, getattr(torch, dtype))
    logger.info(plan.describe(config, served_dtype(dtype)))
    logger.info("Engines that take these sizes: %s", engines_for(plan, config))
    if options.pad is None and (more := engines_by_padding(plan, config)):
        logger.info("Engines that padding would add: %s", more)
    ids = check_ids(folder, config)
    ours = streamed_logits(config, reader, ids, RUNNING)
    with atomic_folder(output, options.overwrite, EXPORT_RECORD_NAME) as partial:
        writer = CheckpointWriter(partial, shard_bytes(options.max_shard_size))
        tensors = stock_tensors(reader, config, plan, gauge, getattr(torch, dtype))
        for name, tensor in tqdm(tensors, desc="Writing", unit="tensor", total=len(stock_names(stock))):
            writer.add(name, tensor)
        writer.finish()
        exported = open_checkpoint(partial, stock)
        written = set(exported.headers())
        assert written == stock_names(stock), sorted(written ^ stock_names(stock))
        stock.save_pretrained(partial)
        copy_companions(folder, partial)
        write_tokenizer(folder, partial)
        agreement = compare_logits(ours, streamed_logits(reference_config(stock), exported, ids, CHECKING))
        logger.info("Check: %s", agreement.describe())
        check_agreement(agreement, dtype)
        write_export_card(partial / "README.md", output.name, folder, model, config, plan, agreement, dtype)
        details = {
            "cache_width": plan.width,
            "model_cache_width": config.latent_cache_dim,
            # How our family says the same table; the way back takes it from here.
            "source": {
                "head_dim": config.head_dim,
                "rope_parameters": config.rope_parameters,
                "slot_of_frequency": plan.table.slots,
            },
        }
        write_record(partial, model, options, details, agreement, time.perf_counter() - start)
    if plan.table.last is not None:
        logger.info("%s.", STEP_NOTE)
    if has_experts(config):
        logger.warning("%s.", NOT_FOR_TRANSFORMERS)


def export_ours(folder: Path, model: str, output: Path, options: ExportConfig) -> None:
    """The way back: a checkpoint of our family."""
    start = time.perf_counter()
    check_output(output, options.overwrite, EXPORT_RECORD_NAME)
    config = load_stock_config(folder, model)
    reader = CheckpointReader(folder)
    check_weights(reader, config)
    layout = find_layout(reader, config)
    rope = find_rope(folder, config, layout)
    dtype = weights_dtype(options, stored_dtype(reader))
    ours = our_config(config, layout, rope, getattr(torch, dtype))
    logger.info("Cache: %d values per token and layer in use", ours.latent_cache_dim)
    ids = check_ids(folder, config)
    stock = streamed_logits(config, reader, ids, RUNNING)
    with atomic_folder(output, options.overwrite, EXPORT_RECORD_NAME) as partial:
        writer = CheckpointWriter(partial, shard_bytes(options.max_shard_size))
        for name, tensor in tqdm(our_tensors(reader, config, ours, layout, rope), desc="Writing", unit="tensor"):
            writer.add(name, tensor.to(ours.dtype).contiguous() if tensor.is_floating_point() else tensor)
        writer.finish()
        check_complete(writer, ours)
        write_companions(partial, folder, ours)
        agreement = compare_logits(stock, streamed_logits(ours, CheckpointReader(partial), ids, CHECKING))
        logger.info("Check: %s", agreement.describe())
        check_agreement(agreement, dtype)
        write_way_back_card(partial / "README.md", output.name, folder, model, ours)
        write_record(partial, model, options, {}, agreement, time.perf_counter() - start)


def export_gguf(folder: Path, model: str, output: Path, options: ExportConfig) -> None:
    """A file for llama.cpp."""
    check_package()
    check_output_file(output, options.overwrite)
    config = load_model_config(folder, model)
    reader = CheckpointReader(folder)
    if has_experts(config):
        raise ValueError(
            f"num_local_experts={config.num_local_experts}: files for llama.cpp are written of dense models only. "
            "Export to format='deepseek-v3' for vLLM."
        )
    check_weights(reader, config)
    plan = plan_export(folder, config, reader, options, allow_step=False)
    dtype = weights_dtype(options, stored_dtype(reader))
    gauge = big_gauge(config.rms_norm_eps, dtype)
    stock = stock_config(config, plan, gauge, torch.float32)
    vocabulary = read_vocabulary(folder, stock.vocab_size)
    logger.info(plan.describe(config, "fp16"))  # llama.cpp's cache, whatever the weights are
    if (advice := advise_padding(plan)) is not None:
        logger.info(advice)
    ids = check_ids(folder, config)
    ours = streamed_logits(config, reader, ids, RUNNING)
    with atomic_file(output) as partial:
        write_gguf(partial, vocabulary, model, reader, config, stock, plan, gauge, dtype)
        agreement = compare_logits(
            ours, streamed_logits(stock, GGUFTensors(partial, stock), ids, CHECKING, gauge.norm_eps)
        )
        logger.info("Check: %s", agreement.describe())
        check_agreement(agreement, dtype)
