"""The way of the preset `paper` through the layers: attention of each, and which of its pairs keep RoPE."""

from collections.abc import Callable, Iterator

import torch

from mha2mla.conversion.attention_weights import SourceAttention
from mha2mla.conversion.job import ConversionJob
from mha2mla.conversion.layerwise import run_layers
from mha2mla.conversion.rotary import Rotation, layer_rotation, num_rotary_pairs, pair_norms


def placed_pairs(
    job: ConversionJob, select: Callable[[int, int], torch.Tensor], num_kept: int
) -> Iterator[tuple[SourceAttention, torch.Tensor, Rotation]]:
    """Attention of each layer, the pairs [G, num_kept] that keep RoPE, by their place: the same in all layers, and
    which pairs turn in the source."""
    pairs = select(num_kept, num_rotary_pairs(job.config)).to(job.device)
    for index in range(job.config.num_hidden_layers):
        attention = job.architecture.attention_tensors(job.tensors, index)
        source = job.architecture.source_attention(attention).to(job.device)
        yield source, pairs.repeat(source.k.shape[0], 1), layer_rotation(job.config, index)


def measured_pairs(
    job: ConversionJob, select: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor], num_kept: int
) -> Iterator[tuple[SourceAttention, torch.Tensor, Rotation]]:
    """The same with a rule that measures queries and keys on the calibration text."""
    turning = num_rotary_pairs(job.config)
    for visit in run_layers(job, "Converting"):
        source = visit.source
        query_norms = torch.zeros((), device=job.device)
        key_norms = torch.zeros((), device=job.device)
        for state in visit.states:
            x = visit.attention_input(state)[0]  # [T, hidden]
            query_norms = query_norms + pair_norms(source.queries(x)).mean(1)
            key_norms = key_norms + pair_norms(source.keys(source.inputs(x))).mean(1)
        yield source, select(num_kept, query_norms[:, :turning], key_norms[:, :turning]), visit.rotation
