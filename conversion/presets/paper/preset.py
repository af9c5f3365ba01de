"""The preset `paper`: its options, the cache it makes, and its way through the layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from mha2mla.conversion.architectures import Architecture
from mha2mla.conversion.attention_weights import SourceAttention
from mha2mla.conversion.cache_plan import CachePlan, CacheSizes, plan_caches, unrotated_rows
from mha2mla.conversion.job import ConversionJob
from mha2mla.conversion.layerwise import run_layers
from mha2mla.conversion.presets.base import ConvertedLayer, Preset
from mha2mla.conversion.rotary import Rotation, layer_rotation, num_rotary_pairs, pair_norms

from .closed_form import convert_attention
from .low_rank import METHODS
from .rope_selection import RULES


@dataclass(kw_only=True)
class Paper(Preset):
    """
    MHA2MLA as published (arXiv 2502.14837): every key/value head keeps RoPE on some of its dims, and the others lie
    with the values in a latent of low rank. The converted model needs recovery training.

    Args:
        rope_selection (`str`, *optional*, defaults to `"2-norm"`): Which frequencies keep RoPE; "2-norm" is measured
            on calibration text.
        svd (`str`, *optional*, defaults to `"joint"`): How keys and values are brought to low rank; "none" leaves them
            as they are.
    """

    name = "paper"
    card_note = (
        "**The paper's conversion needs recovery training**: as converted, before any training, the model's text "
        "is not good."
    )
    _argument_group_name = "preset paper (MHA2MLA as published)"

    rope_selection: str = field(
        default="2-norm",
        metadata={
            "choices": tuple(RULES),
            "help": "Which frequencies keep RoPE. 2-norm needs --data.",
        },
    )
    svd: str = field(
        default="joint",
        metadata={
            "choices": tuple(METHODS),
            "help": "Low rank of keys and values together, apart with half the rank each, or not at all (partial "
            "RoPE alone; the latent is then as large as keys and values).",
        },
    )

    @property
    def use_of_text(self) -> str | None:
        if not RULES[self.rope_selection].NEEDS_TEXT:
            return None
        return f"rope_selection={self.rope_selection!r} (unlike 'uniform') measures queries and keys on text"

    def plans(self, source: Architecture, sizes: CacheSizes) -> list[CachePlan]:
        """A budget is split as in the paper's Table 1: d/8 rotary dims per key/value head, the rest for the latent."""
        config, dim, ranks = source.config, source.head_dim, METHODS[self.svd].ranks
        groups = config.num_key_value_heads
        rope = dim // 8 if sizes.qk_rope_head_dim is None else sizes.qk_rope_head_dim
        possible = ranks(unrotated_rows(config, groups * rope), groups * dim, config.hidden_size)
        if len(possible) == 1:
            if sizes.kv_lora_rank is not None or sizes.cache_ratio is not None:
                raise ValueError(
                    f"svd={self.svd!r} does not compress: give --qk-rope-head-dim only; the latent follows from it."
                )
            sizes = CacheSizes(qk_rope_head_dim=rope, kv_lora_rank=possible[0])
        return plan_caches(sizes, config, groups, lambda width: [max(2, dim // 16 * 2)], ranks)

    def mla_fields(self, source: PreTrainedConfig, plan: CachePlan) -> dict[str, Any]:
        return {
            "qk_nope_head_dim": unrotated_rows(source, plan.rope_width) // source.num_key_value_heads,
            "num_nope_key_heads": source.num_key_value_heads,
        }

    def layers(self, job: ConversionJob, plan: CachePlan) -> Iterator[ConvertedLayer]:
        rule, num_kept = RULES[self.rope_selection], plan.qk_rope_head_dim // 2
        selected = measured_pairs if rule.NEEDS_TEXT else placed_pairs
        nope = self.mla_fields(job.config, plan)["qk_nope_head_dim"]
        for source, pairs, rotation in selected(job, rule.select, num_kept):
            yield ConvertedLayer(convert_attention(source, pairs, plan.kv_lora_rank, self.svd, rotation, nope))

    def card_rows(self) -> dict[str, str]:
        return {"RoPE selection": self.rope_selection, "SVD": self.svd}


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
