"""The way of the preset `calibrated` through the layers: once to measure, once to compare caches, once to convert."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from mha2mla.common.robust_error import robust_error
from mha2mla.conversion.attention_weights import LatentAttention
from mha2mla.conversion.cache_plan import CachePlan
from mha2mla.conversion.job import ConversionJob
from mha2mla.conversion.layerwise import LayerVisit, advance, embed, language_loss, run_layers
from mha2mla.conversion.presets.base import ConvertedLayer
from mha2mla.conversion.rotary import num_rotary_pairs
from mha2mla.conversion.search import lowest_loss

from .closed_form import LayerStatistics, collect_statistics, convert_attention, unrotation_cost
from .frequency_lists import best_lists
from .refine import RefineSettings
from .state import CalibrationState
from .steps import Steps

logger = logging.getLogger(__name__)

NUM_LISTS = 4  # lists of frequencies that are compared


@dataclass(frozen=True)
class Passes:
    """
    Attributes:
        job (`ConversionJob`): The source, with calibration text.
        state (`CalibrationState`): Where the statistics of the layers are, or will be.
        shared_key (`bool`): Whether all query heads share one rotary key.
        steps (`Steps`): The mathematics.
    """

    job: ConversionJob
    state: CalibrationState
    shared_key: bool
    steps: Steps

    def choose(self, plan: CachePlan, common_frequencies: bool, score_samples: int) -> CachePlan:
        """Measure the text, and find the frequencies that all layers share with the lowest loss, every candidate
        converted in closed form."""
        self.collect(score_samples)
        if not common_frequencies:
            return plan
        candidates = self.frequency_plans(plan)

        def layers_of(visit: LayerVisit) -> Iterator[LatentAttention]:
            statistics = self.state.load(visit.index, self.job.device)
            for candidate in candidates:
                yield self.closed_form(visit, statistics, candidate)[0]

        return lowest_loss(self.job, candidates, layers_of)

    def frequency_plans(self, plan: CachePlan) -> list[CachePlan]:
        """The plan with each of the lists of frequencies that promise most for its rotary key."""
        job, shares = self.job, []
        for index in range(job.config.num_hidden_layers):
            statistics = self.state.load(index, job.device)
            cost, energy = unrotation_cost(statistics, job.config.num_attention_heads, self.steps)
            shares.append((cost / energy)[: num_rotary_pairs(job.config)].cpu())
        cost = torch.stack(shares)  # [L, F, A]

        def candidates(expressible: Callable[[Sequence[int]], bool]) -> list[CachePlan]:
            return [
                replace(plan, frequencies=frequencies)
                for frequencies in best_lists(cost, plan.qk_rope_head_dim // 2, NUM_LISTS, expressible)
            ]

        found = candidates(job.expressible)
        if not found and job.engine is not None:
            raise ValueError(
                f"{job.engine} has no rotary table for {plan.qk_rope_head_dim // 2} frequencies as the source's "
                f"rope_parameters={job.config.rope_parameters} make them. Give a smaller --qk-rope-head-dim, or leave "
                "--serve out (transformers then runs the model with our own class)."
            )
        return found or candidates(lambda frequencies: True)

    def layers(self, plan: CachePlan, settings: RefineSettings) -> Iterator[ConvertedLayer]:
        """The converted layers one by one; the losses on held-out text go into the job."""
        job = self.job
        assert job.blocks is not None
        count = len(job.blocks)  # what is behind them is carried along, and nothing is fitted to it
        text = job.blocks if job.held_out is None else torch.cat((job.blocks, job.held_out))
        carried = replace(job, blocks=text)
        stream = embed(carried)
        outputs = stream
        for visit in run_layers(carried, "Converting"):
            start = time.perf_counter()
            layer, metrics = self.closed_form(visit, self.state.load(visit.index, job.device), plan)
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

    @torch.no_grad()
    def collect(self, score_samples: int) -> None:
        """Statistics of every layer, into the state; layers that are there already are passed over."""
        job, state = self.job, self.state
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
                score_samples,
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
