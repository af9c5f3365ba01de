"""A checkpoint in, an MLA checkpoint out."""

import json
import logging
import platform
import time
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from mha2mla.common.adapters import refuse_adapter
from mha2mla.common.device import check_device
from mha2mla.common.kernel_sizes import ENGINES, Engine
from mha2mla.common.loading import keys_values_width, load_config
from mha2mla.common.options import shard_bytes
from mha2mla.common.outputs import atomic_folder, check_output
from mha2mla.common.records import RECORD_NAME
from mha2mla.common.scratch import scratch_folder
from mha2mla.common.text import load_blocks
from mha2mla.common.text_sources import check_files, find_sources
from mha2mla.common.tokenizer import check_known
from mha2mla.common.versions import versions
from mha2mla.modeling.latent_config import LatentConfigMixin

from .architectures import Architecture, architecture_of
from .cache_plan import CachePlan, served_dtype
from .cache_sizes import CacheSizes
from .config import ConversionConfig
from .export.engines import (
    advise_sizes,
    check_servable,
    engines_for_frequencies,
    expressible_lists,
    kernel_sizes,
)
from .fused import open_checkpoint
from .job import ConversionJob
from .model_card import write_model_card
from .output import write_companions, write_weights
from .presets import Preset
from .recovered import LEAST, SMALL, is_small
from .source import local_checkpoint
from .summary import summary
from .survey import engines_of
from .weights_check import check_weights, stored_dtype

logger = logging.getLogger(__name__)

HELD_OUT_BLOCKS = 8  # of the same text as the calibration's, to measure the result on
PACKAGES = ("mha2mla", "torch", "transformers", "safetensors")


def convert(
    source: str | Path,
    output: str | Path,
    options: ConversionConfig,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """
    Convert a checkpoint and write it as a folder that `from_pretrained(..., trust_remote_code=True)` loads.

    Weights are read and written tensor by tensor; memory holds a layer, a shard of the output, and the activations of
    the calibration text.

    Args:
        source (`str` or `Path`): Local folder, .gguf file, or name on the Hub.
        output (`str` or `Path`): Folder to write; it appears only once it is complete.
        options (`ConversionConfig`): What to do.
        revision (`str`, *optional*): Branch, tag or commit of a source on the Hub.
        gguf_file (`str`, *optional*): Name of a GGUF file in the source.
        trust_remote_code (`bool`): Whether code that the source brings along for its tokenizer may be run.

    Returns:
        The output folder.

    Raises:
        ValueError: If the source cannot be converted or the options do not fit it; nothing is written then.
    """
    start = time.perf_counter()
    source, output, preset = str(source), Path(output), options.preset
    check_output(output, options.overwrite)
    check_device(options.device)
    if preset.use_of_text is not None:
        assert options.data is not None  # by the config
        check_files(find_sources(options.data, options.column, options.subset, options.split))
    with local_checkpoint(source, revision, gguf_file) as folder:
        refuse_adapter(folder, source, "source")  # of one with a config, transformers would load the base model, too
        config = load_config(str(folder), "source")
        architecture, tensors = architecture_of(config), open_checkpoint(folder, config)
        architecture.check_tensors(tensors)
        check_weights(tensors, config)
        if config.tie_word_embeddings and architecture.has_own_head(tensors):
            config.tie_word_embeddings = False  # what lies in the file counts, as it does for transformers
        engine = None if options.serve is None else ENGINES[options.serve]
        source_width = keys_values_width(config)
        plan = plan_sizes(architecture, options, preset, engine)
        dtype = stored_dtype(tensors) if options.dtype == "auto" else getattr(torch, options.dtype)
        logger.info(plan.describe(served_dtype(dtype)))
        if is_small(plan.ratio):
            remedy = f"Take --cache-ratio 0.3125, or at least {LEAST / 100:g}"
            remedy += "" if engine is None else ", without --serve"
            logger.warning("That is %.3g %%, %s. %s.", 100 * plan.ratio, SMALL, remedy)

        def config_of(plan: CachePlan) -> LatentConfigMixin:
            bias = architecture.has_attention_bias(tensors)
            return preset.mla_config(architecture, plan, attention_bias=bias, dtype=dtype)

        def runs_by_kernels(engine: Engine) -> bool:
            try:
                kernels = plan_sizes(architecture, CacheSizes(), preset, engine)
            except ValueError:
                return False
            takers, _ = engines_of(architecture, kernels, config_of(kernels))
            return preset.common_frequencies and engine in dict(takers)

        advice = advise_sizes(plan.width, source_width) if engine is None else None
        if advice is not None and runs_by_kernels(ENGINES["vllm"]):
            logger.info(advice)
        if engine is not None:
            check_servable(config_of(plan), preset.common_frequencies, engine)
        blocks, held_out = load_text(folder, options, config, trust_remote_code)
        with (
            atomic_folder(output, options.overwrite) as partial,
            scratch_folder("mha2mla-conversion-") as scratch,
        ):
            job = ConversionJob(
                architecture,
                tensors,
                blocks,
                options.device,
                options.seed,
                scratch,
                cache(tensors.digest),
                engine=None if engine is None else engine.title,
                expressible=expressible_lists(config_of(plan), engine or ENGINES["transformers"]),
                held_out=held_out,
            )
            plan = preset.choose(job, plan)
            logger.info("Chosen: %s", plan)
            mla_config = config_of(plan)
            if plan.frequencies is not None:
                _, engines = engines_for_frequencies(mla_config, plan.frequencies, plan.source_width)
                logger.info("Engines for an export: %s", engines)
            write_companions(
                partial, folder, mla_config, trust_remote_code
            )  # the tokenizer is proved before the long work
            most = shard_bytes(options.max_shard_size)
            records = write_weights(partial, job, mla_config, preset.layers(job, plan), most)
            record = {
                "source": source,
                "revision": folder.name if folder.parent.name == "snapshots" else revision,
                "gguf_file": gguf_file,
                "options": options.to_dict(),
                "kv_lora_rank": plan.kv_lora_rank,
                "qk_rope_head_dim": plan.qk_rope_head_dim,
                "num_rope_key_heads": plan.num_rope_key_heads,
                "cache_width": plan.width,
                "source_cache_width": plan.source_width,
                "held_out_loss": job.losses,
                "seconds": round(time.perf_counter() - start, 1),
                "versions": versions(*PACKAGES) | {"python": platform.python_version()},
                "layers": records,
            }
            (partial / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
            is_repo = not Path(source).exists()
            write_model_card(partial / "README.md", source, is_repo, output.name, options, plan, mla_config, revision)
    original = None if gguf_file is not None or source.endswith(".gguf") else source
    logger.info(summary(original, output, options, plan, mla_config, job.losses, served_dtype(dtype)))
    return output


def plan_sizes(architecture: Architecture, sizes: CacheSizes, preset: Preset, engine: Engine | None) -> CachePlan:
    """The preset's plan for what is asked for, which for an engine may have the sizes of its kernels. A `ValueError`
    if the source cannot have such a cache."""
    if engine is None:
        return preset.plan(architecture, sizes)
    chosen = kernel_sizes(sizes, engine, keys_values_width(architecture.config))
    try:
        return preset.plan(architecture, chosen)
    except ValueError as reason:
        if chosen is sizes:  # the user's own
            raise
        raise ValueError(
            f"The source has too few rotary frequencies, or too small matrices, to fill {chosen.kv_lora_rank} + "
            f"{chosen.qk_rope_head_dim}, which {engine.title} takes. Give smaller --kv-lora-rank and "
            "--qk-rope-head-dim, and export with --pad."
        ) from reason


def load_text(
    folder: Path, options: ConversionConfig, config: PreTrainedConfig, trust_remote_code: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Calibration blocks [samples, length], if the preset has any use for text, and blocks [at most HELD_OUT_BLOCKS,
    length] to measure the result on, if there is so much."""
    if options.preset.use_of_text is None:
        return None, None
    assert options.data is not None and options.samples is not None and options.length is not None
    if options.length > (limit := config.max_position_embeddings):
        raise ValueError(f"length={options.length} is more than the source's context: give --length {limit}.")
    blocks = load_blocks(
        folder,
        options.data,
        options.samples,
        options.length,
        options.column,
        options.subset,
        options.split,
        options.seed,
        trust_remote_code,
        HELD_OUT_BLOCKS,
    )
    check_known("The text", int(blocks.max()), config.vocab_size)
    held_out = blocks[options.samples :]
    return blocks[: options.samples], held_out if len(held_out) > 0 else None
