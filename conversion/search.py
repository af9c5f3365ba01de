"""Choosing between plans by measured loss."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from .attention_weights import LatentAttention
from .cache_plan import CachePlan
from .job import ConversionJob
from .layerwise import LayerVisit, advance, embed, language_loss, run_layers

logger = logging.getLogger(__name__)

NUM_SEARCH_BLOCKS = 4  # of the calibration text, on which plans are compared
TIE = 0.01  # nats a token that so little text cannot tell apart


@torch.no_grad()
def lowest_loss(
    job: ConversionJob, plans: Sequence[CachePlan], layers_of: Callable[[LayerVisit], Iterable[LatentAttention]]
) -> CachePlan:
    """
    The plan with the lowest loss on calibration text; of plans that it cannot tell apart, one that every engine takes.

    All plans are carried through the model side by side, so that the source's layers are read once. All layers share
    the plan: a serving engine holds the cache in pages of one size.

    Args:
        plans (`Sequence[CachePlan]`): What is compared.
        layers_of (`Callable`): The layer that is visited as each of the plans has it, in their order.
    """
    if len(plans) == 1:
        return plans[0]
    assert job.blocks is not None
    job = replace(job, blocks=job.blocks[:NUM_SEARCH_BLOCKS])
    streams = [embed(job) for _ in plans]
    for visit in run_layers(job, "Comparing"):
        for layer, stream in zip(layers_of(visit), streams, strict=True):
            advance(visit, layer, stream)
    losses = [language_loss(job, stream) for stream in streams]
    for plan, loss in zip(plans, losses, strict=True):
        logger.info("  %s: loss %.4f", plan, loss)
    best = min(losses)
    ranked = sorted(zip(losses, plans, strict=True), key=lambda pair: pair[0])
    plain = [plan for loss, plan in ranked if plan.is_plain and loss <= best + TIE]
    return plain[0] if plain else ranked[0][1]
