"""The preset `paper`: its options, and the cache it makes. What takes torch is imported where it is used, as `--help`
must not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.presets.base import ConvertedLayer, Preset

from .low_rank import METHODS
from .rope_selection import RULES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mha2mla.conversion.architectures import Architecture
    from mha2mla.conversion.cache_plan import CachePlan
    from mha2mla.conversion.job import ConversionJob


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

    def plan(self, source: Architecture, sizes: CacheSizes) -> CachePlan:
        """A budget is split as in the paper's Table 1: d/8 rotary dims per key/value head, the rest for the latent."""
        from mha2mla.conversion.cache_plan import plan_cache, unrotated_rows

        config, dim, ranks = source.config, source.head_dim, METHODS[self.svd].ranks
        groups = config.num_key_value_heads
        default = max(2, dim // 16 * 2)
        rope = default if sizes.qk_rope_head_dim is None else sizes.qk_rope_head_dim
        possible = ranks(unrotated_rows(config, groups * rope), groups * dim, config.hidden_size)
        if len(possible) == 1:
            if sizes.kv_lora_rank is not None or sizes.cache_ratio is not None:
                raise ValueError(
                    f"svd={self.svd!r} does not compress: give --qk-rope-head-dim only; the latent follows from it."
                )
            sizes = CacheSizes(qk_rope_head_dim=rope, kv_lora_rank=possible[0])
        return plan_cache(sizes, config, groups, lambda width: default, ranks)

    def mla_fields(self, source: PreTrainedConfig, plan: CachePlan) -> dict[str, Any]:
        from mha2mla.conversion.cache_plan import unrotated_rows

        return {
            "qk_nope_head_dim": unrotated_rows(source, plan.rope_width) // source.num_key_value_heads,
            "num_nope_key_heads": source.num_key_value_heads,
        }

    def layers(self, job: ConversionJob, plan: CachePlan) -> Iterator[ConvertedLayer]:
        from .closed_form import convert_attention
        from .passes import measured_pairs, placed_pairs

        rule, num_kept = RULES[self.rope_selection], plan.qk_rope_head_dim // 2
        selected = measured_pairs if rule.NEEDS_TEXT else placed_pairs
        nope = self.mla_fields(job.config, plan)["qk_nope_head_dim"]
        for source, pairs, rotation in selected(job, rule.select, num_kept):
            yield ConvertedLayer(convert_attention(source, pairs, plan.kv_lora_rank, self.svd, rotation, nope))

    def card_rows(self) -> dict[str, str]:
        return {"RoPE selection": self.rope_selection, "SVD": self.svd}
