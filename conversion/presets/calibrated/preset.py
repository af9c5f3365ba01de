"""The preset `calibrated`: its options, and the caches it tries. What takes torch is imported where it is used, as
`--help` must not wait for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mha2mla.common.options import check_least
from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.presets.base import ConvertedLayer, Preset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mha2mla.conversion.architectures import Architecture
    from mha2mla.conversion.cache_plan import CachePlan
    from mha2mla.conversion.job import ConversionJob

    from .passes import Passes

# The rotary key where only a budget is given, of a head's dims, and the most of the cache. The closed form would
# always have more, but refinement mends what is lost by rotation better than what is lost by rank, and training better
# still: docs/dev/conversion.md, "How much rotates".
ROPE_OF_HEAD, MOST_OF_CACHE = 0.375, 0.34


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
        refine_steps (`int`, *optional*): Gradient steps on each layer; by default 320, on a CPU 256.
        refine_batch_size (`int`, *optional*, defaults to 1): Blocks of text a step.
        refine_learning_rate (`float`, *optional*, defaults to 0.03): Relative to the root mean square of each matrix.
        score_samples (`int`, *optional*, defaults to 4): Blocks from which the cost of un-rotating is measured.
        calibration_state (`str`, *optional*): Folder that keeps the statistics for another conversion.
    """

    name = "calibrated"
    card_note = (
        "Converted on calibration text alone, without training; recovery fine-tuning brings the model nearer to its "
        "source."
    )
    use_of_text = "The preset 'calibrated' measures the model on text"
    steps: ClassVar[Any] = None  # not an option: those of the ablations, instead of the default
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
    refine_steps: int | None = field(
        default=None,
        metadata={
            "help": "Gradient steps on each layer against the original's, 0: none; by default 320, or 256 on a CPU."
        },
    )
    refine_batch_size: int = field(default=1, metadata={"help": "Blocks of text a refinement step."})
    refine_learning_rate: float = field(
        default=0.03, metadata={"help": "Relative to the root mean square of each matrix."}
    )
    score_samples: int = field(default=4, metadata={"help": "Blocks from which the cost of un-rotating is measured."})
    calibration_state: str | None = field(
        default=None, metadata={"help": "Folder that keeps the statistics, to convert again at another size."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_least(self, score_samples=1, refine_steps=0, refine_batch_size=1, refine_learning_rate=0)

    def on_device(self, device: str) -> Calibrated:
        if self.refine_steps is not None:
            return self
        return replace(self, refine_steps=256 if device == "cpu" else 320)

    @property
    def shared_key(self) -> bool:
        """Whether all query heads share one rotary key."""
        return self.rope_layout == "shared"

    @property
    def common_frequencies(self) -> bool:
        return self.shared_key and self.rope_frequencies == "common"

    def plan(self, source: Architecture, sizes: CacheSizes) -> CachePlan:
        from mha2mla.conversion.cache_plan import plan_cache
        from mha2mla.conversion.rotary import head_dim, num_rotary_pairs

        groups, pairs = source.config.num_key_value_heads, num_rotary_pairs(source.config)
        rope_keys = 1 if self.shared_key else groups
        most_rope = 2 * pairs if self.common_frequencies else groups * 2 * pairs // rope_keys
        rope = sizes.qk_rope_head_dim
        if rope is not None and self.common_frequencies and rope > 2 * pairs:
            raise ValueError(
                f"qk_rope_head_dim={rope} asks for {rope // 2} different frequencies, and the source has {pairs} "
                f"frequencies. Give {2 * pairs} or less, or --rope-frequencies per-layer, which repeats them."
            )

        def rope_dims(width: int) -> int:
            wanted = min(ROPE_OF_HEAD * head_dim(source.config), MOST_OF_CACHE * width / rope_keys)
            beyond = (width - source.latent_inputs) / rope_keys  # what no latent can hold
            return min(max(2, round(wanted / 2) * 2, math.ceil(beyond / 2) * 2), most_rope)

        def ranks(key_rows: int, value_rows: int, hidden_size: int) -> range:
            return range(1, min(key_rows + value_rows, source.latent_inputs) + 1)

        return plan_cache(sizes, source.config, rope_keys, rope_dims, ranks)

    def mla_fields(self, source: PreTrainedConfig, plan: CachePlan) -> dict[str, Any]:
        from mha2mla.conversion.rotary import head_dim

        # Un-rotated queries keep all dims: a pair may be rotated in one component and not in others.
        return {"qk_nope_head_dim": head_dim(source), "num_nope_key_heads": source.num_attention_heads}

    def card_rows(self) -> dict[str, str]:
        return {"Refinement": f"{self.refine_steps} steps a layer, blocks a step: {self.refine_batch_size}"}

    def passes(self, job: ConversionJob) -> Passes:
        from .passes import Passes
        from .state import CalibrationState, fingerprint
        from .steps import DEFAULT_STEPS

        assert job.blocks is not None
        folder = Path(self.calibration_state or job.scratch / "statistics")
        weights = job.digest() if self.calibration_state else ""  # reads all of them
        identity = fingerprint(job.config, weights, job.blocks, self.score_samples, self.shared_key)
        state = CalibrationState(folder, identity)
        return Passes(job, state, self.shared_key, self.steps or DEFAULT_STEPS)

    def choose(self, job: ConversionJob, plan: CachePlan) -> CachePlan:
        return self.passes(job).choose(plan, self.common_frequencies, self.score_samples)

    def layers(self, job: ConversionJob, plan: CachePlan) -> Iterator[ConvertedLayer]:
        from .refine import RefineSettings

        assert self.refine_steps is not None  # by `on_device`
        settings = RefineSettings(self.refine_steps, self.refine_batch_size, self.refine_learning_rate)
        return self.passes(job).layers(plan, settings)
