"""From the source's layers to converted ones, layer by layer, for both presets."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedConfig

from mha2mla.common.robust_error import robust_error
from mha2mla.conversion.presets.calibrated import closed_form as calibrated
from mha2mla.conversion.presets.paper import closed_form as paper

from .attention_weights import LatentAttention, SourceAttention
from .checkpoint import CheckpointReader
from .config import CachePlan, ConversionConfig
from .layerwise import LayerVisit, embed, language_loss, run_layers
from .presets.calibrated.refine import RefineSettings, attend, refine_layer
from .presets.calibrated.state import CalibrationState
from .presets.paper.rope_selection import pair_norms, select_by_position, select_by_score, two_norm_scores
from .source import head_dim, rope_attention_scaling

logger = logging.getLogger(__name__)

NUM_SEARCH_BLOCKS = 4  # of the calibration text, on which the split of a budget is chosen


@dataclass
class ConvertedLayer:
    """A layer and what was measured on the way; `metrics` goes into the record."""

    attention: LatentAttention
    metrics: dict[str, float] = field(default_factory=dict)


def source_attention(visit: LayerVisit, config: PreTrainedConfig) -> SourceAttention:
    return SourceAttention.from_tensors(visit.layer.self_attn.state_dict(), head_dim(config))


def paper_layers(
    reader: CheckpointReader,
    config: PreTrainedConfig,
    options: ConversionConfig,
    plan: CachePlan,
    blocks: torch.Tensor | None,
) -> Iterator[ConvertedLayer]:
    """The preset `paper`; `blocks` of text are needed for the 2-norm rule only."""
    num_kept, num_pairs = plan.qk_rope_head_dim // 2, head_dim(config) // 2
    scaling = rope_attention_scaling(config)
    if blocks is None:
        pairs = select_by_position(options.rope_selection, num_kept, num_pairs).to(options.device)
        pairs = pairs.repeat(config.num_key_value_heads, 1)
        for index in range(config.num_hidden_layers):
            tensors = reader.with_prefix(f"model.layers.{index}.self_attn.")
            source = SourceAttention.from_tensors(tensors, head_dim(config)).to(options.device)
            yield ConvertedLayer(paper.convert_attention(source, pairs, plan.kv_lora_rank, options.svd, scaling))
        return
    for visit in run_layers(reader, config, blocks, options.device, "Converting"):
        source = source_attention(visit, config)
        query_norms = torch.zeros((), device=options.device)
        key_norms = torch.zeros((), device=options.device)
        for state in visit.states:
            x = visit.attention_input(state)[0]  # [T, hidden]
            query_norms = query_norms + pair_norms(calibrated.project(x, source.q, source.q_bias)).mean(1)
            key_norms = key_norms + pair_norms(calibrated.project(x, source.k, source.k_bias)).mean(1)
        pairs = select_by_score(two_norm_scores(query_norms, key_norms), num_kept)
        yield ConvertedLayer(paper.convert_attention(source, pairs, plan.kv_lora_rank, options.svd, scaling))


def block_input(visit: LayerVisit, index: int) -> torch.Tensor:
    """What attention reads of a block of text, [T, hidden]."""
    return visit.attention_input(visit.states[index])[0]


@torch.no_grad()
def collect_state(
    reader: CheckpointReader,
    config: PreTrainedConfig,
    options: ConversionConfig,
    blocks: torch.Tensor,
    state: CalibrationState,
) -> None:
    """Statistics of every layer, into the state; layers that are there already are passed over."""
    if all(index in state for index in range(config.num_hidden_layers)):
        logger.info("Statistics taken from %s", state.folder)
        return
    scaling = rope_attention_scaling(config)
    for index, visit in enumerate(run_layers(reader, config, blocks, options.device, "Measuring")):
        if index in state:
            continue
        statistics = calibrated.collect_statistics(
            source_attention(visit, config),
            partial(block_input, visit),
            len(blocks),
            options.score_samples,
            visit.frequencies,
            options.shared_key,
            scaling,
        )
        state.save(index, statistics)


def closed_form(
    visit: LayerVisit,
    statistics: calibrated.LayerStatistics,
    config: PreTrainedConfig,
    options: ConversionConfig,
    plan: CachePlan,
) -> tuple[LatentAttention, dict[str, float]]:
    return calibrated.convert_attention(
        source_attention(visit, config),
        statistics,
        plan.qk_rope_head_dim,
        plan.kv_lora_rank,
        options.shared_key,
        rope_attention_scaling(config),
    )


@torch.no_grad()
def search_split(
    reader: CheckpointReader,
    config: PreTrainedConfig,
    options: ConversionConfig,
    blocks: torch.Tensor,
    state: CalibrationState,
    plans: list[CachePlan],
) -> CachePlan:
    """
    The split of a cache budget into rotary key and latent with the lowest loss on calibration text.

    Every candidate is converted in closed form and carried through the model side by side, so that the source's layers
    are read once. All layers share the split: a serving engine holds the cache in pages of one size.
    """
    if len(plans) == 1:
        return plans[0]
    blocks = blocks[:NUM_SEARCH_BLOCKS]
    streams = [embed(reader, blocks) for _ in plans]
    for index, visit in enumerate(run_layers(reader, config, blocks, options.device, "Splitting")):
        statistics = state.load(index, options.device)
        for plan, stream in zip(plans, streams, strict=True):
            layer, _ = closed_form(visit, statistics, config, options, plan)
            advance(visit, layer, stream)
    losses = [language_loss(reader, config, stream, blocks, options.device) for stream in streams]
    for plan, loss in zip(plans, losses, strict=True):
        logger.info("  rotary %4d + latent %4d: loss %.4f", plan.rope_width, plan.kv_lora_rank, loss)
    return plans[losses.index(min(losses))]


@torch.no_grad()
def advance(visit: LayerVisit, layer: LatentAttention, stream: list[torch.Tensor]) -> float:
    """Carry the converted model's residual stream through the converted layer, in place; the error it has then
    against the original's, as refinement measures it."""
    errors = []
    for i, block in enumerate(stream):
        attention = attend(layer, visit.attention_input(block), visit.position_embeddings)
        output = visit.after_mlp(block.to(attention.device) + attention)
        errors.append(robust_error(output, visit.outputs[i].to(output.device)))
        stream[i] = output.to(block.device)
    return torch.stack(errors).mean().item()


def calibrated_layers(
    reader: CheckpointReader,
    config: PreTrainedConfig,
    options: ConversionConfig,
    plan: CachePlan,
    blocks: torch.Tensor,
    state: CalibrationState,
) -> Iterator[ConvertedLayer]:
    """The preset `calibrated`: each layer in closed form, then refined behind the layers converted before it."""
    settings = RefineSettings(options.refine_steps, options.refine_batch_size, options.refine_learning_rate)
    stream = embed(reader, blocks)
    for index, visit in enumerate(run_layers(reader, config, blocks, options.device, "Converting")):
        start = time.perf_counter()
        layer, metrics = closed_form(visit, state.load(index, options.device), config, options, plan)
        if settings.steps > 0:
            layer = refine_layer(layer, visit, stream, settings, options.seed + index)
        metrics["output_error"] = advance(visit, layer, stream)
        metrics["seconds"] = time.perf_counter() - start
        yield ConvertedLayer(layer, metrics)
