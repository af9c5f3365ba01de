"""The preset `calibrated`: its options, the caches it tries, and its way through the layers."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from mha2mla.common.options import check_least
from mha2mla.common.robust_error import robust_error
from mha2mla.conversion.architectures import Architecture
from mha2mla.conversion.attention_weights import LatentAttention
from mha2mla.conversion.cache_plan import CachePlan, CacheSizes, plan_caches
from mha2mla.conversion.job import ConversionJob
from mha2mla.conversion.layerwise import LayerVisit, advance, embed, language_loss, run_layers
from mha2mla.conversion.presets.base import ConvertedLayer, Preset
from mha2mla.conversion.rotary import head_dim, num_rotary_pairs
from mha2mla.conversion.search import lowest_loss

from .closed_form import LayerStatistics, collect_statistics, convert_attention, unrotation_cost
from .frequency_lists import best_lists
from .refine import RefineSettings
from .state import CalibrationState, fingerprint
from .steps import DEFAULT_STEPS

logger = logging.getLogger(__name__)

# Of a cache, for the rotary keys: tried where the split is not given. The closed form would always like more, and
# refinement, which mends what is lost by rotation better than what is lost by rank, does not: docs/dev/conversion.md.
ROPE_SHARES = (0.27, 0.34)
NUM_LISTS = 4  # lists of frequencies compared for each split


@dataclass(kw_only=True)
class Calibrated(Preset):
    """
    Ours: each layer in closed form from what calibration text says about it, then refined after the layers converted
    before it.

    Args:
        rope_layout (`str`, *optional*, defaults to `"shared"`): One rotary key for all heads, or one `"per-head"`.
        rope_frequencies (`str`, *optional*, defaults to `"common"`): One list of frequencies for all layers, which
            DeepSeek's inference engines can express, or each layer's own, `"per-layer"`. Rotary keys per head have
            their own.
        refine_steps (`int`, *optional*, defaults to 320): Gradient steps on each layer.
        refine_batch_size (`int`, *optional*, defaults to 2): Blocks of text a step.
        refine_learning_rate (`float`, *optional*, defaults to 0.03): Relative to the root mean square of each matrix.
        score_samples (`int`, *optional*, defaults to 8): Blocks from which the cost of un-rotating is measured.
        calibration_state (`str`, *optional*): Folder that keeps the statistics for another conversion.
    """

    name = "calibrated"
    card_note = (
        "Converted on calibration text alone, without training; recovery fine-tuning brings the model nearer to its "
        "source."
    )
    use_of_text = "The preset 'calibrated' measures the model on text"
    steps = DEFAULT_STEPS  # not an option
    _argument_group_name = "preset calibrated (ours)"

    rope_layout: Literal["shared", "per-head"] = field(
        default="shared", metadata={"help": "One rotary key for all heads, or one per key/value head."}
    )
    rope_frequencies: Literal["common", "per-layer"] = field(
        default="common",
        metadata={
            "help": "What a shared rotary key rotates with: one list of frequencies for all layers, which inference "
            "engines made for DeepSeek can express, or each layer's own choice."
        },
    )
    refine_steps: int = field(
        default=320, metadata={"help": "Gradient steps on each layer against the original's; 0: none."}
    )
    refine_batch_size: int = field(default=2, metadata={"help": "Blocks of text a refinement step."})
    refine_learning_rate: float = field(
        default=0.03, metadata={"help": "Relative to the root mean square of each matrix."}
    )
    score_samples: int = field(default=8, metadata={"help": "Blocks from which the cost of un-rotating is measured."})
    calibration_state: str | None = field(
        default=None, metadata={"help": "Folder that keeps the statistics, to convert again at another size."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_least(self, score_samples=1, refine_steps=0, refine_batch_size=1, refine_learning_rate=0)

    @property
    def shared_key(self) -> bool:
        """Whether all query heads share one rotary key."""
        return self.rope_layout == "shared"

    @property
    def common_frequencies(self) -> bool:
        return self.shared_key and self.rope_frequencies == "common"

    def plans(self, source: Architecture, sizes: CacheSizes) -> list[CachePlan]:
        """For a budget, several splits, of which the best is found by measurement."""
        groups, pairs = source.config.num_key_value_heads, num_rotary_pairs(source.config)
        rope_keys = 1 if self.shared_key else groups
        most_rope = 2 * pairs if self.common_frequencies else groups * 2 * pairs // rope_keys
        rope = sizes.qk_rope_head_dim
        if rope is not None and self.common_frequencies and rope > 2 * pairs:
            raise ValueError(
                f"qk_rope_head_dim={rope} asks for {rope // 2} different frequencies, and the source has {pairs} "
                f"frequencies. Give {2 * pairs} or less, or --rope-frequencies per-layer, which repeats them."
            )

        def rope_dims(width: int) -> list[int]:
            wanted = (round(share * width / rope_keys / 2) * 2 for share in ROPE_SHARES)
            return sorted({min(max(2, rope), most_rope) for rope in wanted})

        def ranks(key_rows: int, value_rows: int, hidden_size: int) -> range:
            return range(1, min(key_rows + value_rows, source.latent_inputs) + 1)

        return plan_caches(sizes, source.config, rope_keys, rope_dims, ranks)

    def mla_fields(self, source: PreTrainedConfig, plan: CachePlan) -> dict[str, Any]:
        # Un-rotated queries keep all dims: a pair may be rotated in one component and not in others.
        return {"qk_nope_head_dim": head_dim(source), "num_nope_key_heads": source.num_attention_heads}

    def card_rows(self) -> dict[str, str]:
        return {"Refinement": f"{self.refine_steps} steps a layer x {self.refine_batch_size} blocks"}

    def choose(self, job: ConversionJob, plans: list[CachePlan]) -> CachePlan:
        """Measure the text, and find the split, and the frequencies that all layers share, with the lowest loss, every
        candidate converted in closed form."""
        state = self.open_state(job)
        self.collect(job, state)
        candidates = self.frequency_plans(job, state, plans) if self.common_frequencies else plans

        def layers_of(visit: LayerVisit) -> Iterator[LatentAttention]:
            statistics = state.load(visit.index, job.device)
            for plan in candidates:
                yield self.closed_form(visit, statistics, plan)[0]

        return lowest_loss(job, candidates, layers_of)

    def frequency_plans(self, job: ConversionJob, state: CalibrationState, plans: list[CachePlan]) -> list[CachePlan]:
        """Every plan with each of the lists of frequencies that promise most for its rotary key."""
        shares = []
        for index in range(job.config.num_hidden_layers):
            cost, energy = unrotation_cost(state.load(index, job.device), job.config.num_attention_heads, self.steps)
            shares.append((cost / energy)[: num_rotary_pairs(job.config)].cpu())
        cost = torch.stack(shares)  # [L, F, A]

        def candidates(expressible: Callable[[Sequence[int]], bool]) -> list[CachePlan]:
            return [
                replace(plan, frequencies=frequencies)
                for plan in plans
                for frequencies in best_lists(cost, plan.qk_rope_head_dim // 2, NUM_LISTS, expressible)
            ]

        found = candidates(job.expressible)
        if not found and job.engine is not None:
            raise ValueError(
                f"{job.engine} has no rotary table for {plans[0].qk_rope_head_dim // 2} frequencies as the source's "
                f"rope_parameters={job.config.rope_parameters} make them. Give a smaller --qk-rope-head-dim, or leave "
                "--serve out (transformers then runs the model with our own class)."
            )
        return found or candidates(lambda frequencies: True)

    def layers(self, job: ConversionJob, plan: CachePlan) -> Iterator[ConvertedLayer]:
        assert job.blocks is not None
        state = self.open_state(job)
        settings = RefineSettings(self.refine_steps, self.refine_batch_size, self.refine_learning_rate)
        count = len(job.blocks)  # what is behind them is carried along, and nothing is fitted to it
        text = job.blocks if job.held_out is None else torch.cat((job.blocks, job.held_out))
        carried = replace(job, blocks=text)
        stream = embed(carried)
        outputs = stream
        for visit in run_layers(carried, "Converting"):
            start = time.perf_counter()
            layer, metrics = self.closed_form(visit, state.load(visit.index, job.device), plan)
            if settings.steps > 0:
                layer = self.steps.refine(layer, visit, stream[:count], settings, job.seed + visit.index)
            advance(visit, layer, stream)
            metrics["output_error"] = output_error(visit, stream[:count])
            metrics["seconds"] = time.perf_counter() - start
            outputs = visit.outputs
            yield ConvertedLayer(layer, metrics)
        if job.held_out is not None:
            held_out = replace(job, blocks=job.held_out)
            job.losses["source"] = language_loss(held_out, outputs[count:])
            job.losses["converted"] = language_loss(held_out, stream[count:])

    def open_state(self, job: ConversionJob) -> CalibrationState:
        assert job.blocks is not None
        folder = Path(self.calibration_state or job.scratch / "statistics")
        return CalibrationState(folder, fingerprint(job.config, job.blocks, self.score_samples, self.shared_key))

    @torch.no_grad()
    def collect(self, job: ConversionJob, state: CalibrationState) -> None:
        """Statistics of every layer, into the state; layers that are there already are passed over."""
        assert job.blocks is not None
        if all(index in state for index in range(job.config.num_hidden_layers)):
            logger.info("Statistics taken from %s", state.folder)
            return
        for visit in run_layers(job, "Measuring"):
            if visit.index in state:
                continue
            statistics = collect_statistics(
                visit.source,
                partial(block_input, visit),
                len(job.blocks),
                self.score_samples,
                visit.frequencies,
                self.shared_key,
                visit.rotation,
                self.steps,
            )
            state.save(visit.index, statistics)

    def closed_form(
        self, visit: LayerVisit, statistics: LayerStatistics, plan: CachePlan
    ) -> tuple[LatentAttention, dict[str, float]]:
        """The layer that is visited, as the plan has it, and what it cost by stage."""
        return convert_attention(
            visit.source,
            statistics,
            plan.qk_rope_head_dim,
            plan.kv_lora_rank,
            self.shared_key,
            visit.rotation,
            self.steps,
            plan.frequencies,
        )


def block_input(visit: LayerVisit, index: int) -> torch.Tensor:
    """What attention reads of a block of text, [T, hidden]."""
    return visit.attention_input(visit.states[index])[0]


@torch.no_grad()
def output_error(visit: LayerVisit, stream: list[torch.Tensor]) -> float:
    """How far the converted model's residual stream is from the original's after this layer, as refinement has it."""
    device = visit.frequencies.device
    pairs = zip(stream, visit.outputs, strict=False)  # of the text that is fitted to, which comes first
    return torch.stack([robust_error(got.to(device), wanted.to(device)) for got, wanted in pairs]).mean().item()
