"""What a preset is: its options, the caches it can make, the layers, and what the model card says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mha2mla.common.options import check_choices, settle_types

from ..cache_sizes import CacheSizes

if TYPE_CHECKING:  # they import torch, and a preset's options must be there without it
    from transformers import PreTrainedConfig

    from mha2mla.modeling.latent_config import LatentConfigMixin

    from ..architectures import Architecture
    from ..attention_weights import LatentAttention
    from ..cache_plan import CachePlan
    from ..job import ConversionJob


@dataclass
class ConvertedLayer:
    """A layer and what was measured on the way; `metrics` goes into the record."""

    attention: LatentAttention
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Preset(ABC):
    """
    A way to make MLA weights: a folder here, whose package has a subclass of this one. The subclass is a dataclass
    whose fields are the preset's options, with their help for the command line.

    Class attributes:
        name (`str`): What `--preset` calls it.
        card_note (`str`): What the model card says to expect, in Markdown.
        _argument_group_name (`str`): What `--help` writes over its options.
    """

    name: ClassVar[str]
    card_note: ClassVar[str]
    _argument_group_name: ClassVar[str]

    def __post_init__(self):
        settle_types(self)
        check_choices(self)

    def on_device(self, device: str) -> Preset:
        """The preset with what was left open settled, for a conversion on this device."""
        return self

    @property
    def use_of_text(self) -> str | None:
        """What calibration text is needed for, in half a sentence; None if the preset, as its options are, needs
        none."""
        return None

    @property
    def common_frequencies(self) -> bool:
        """Whether all layers rotate with the same frequencies, in one rotary key, as inference engines need."""
        return False

    @abstractmethod
    def plan(self, source: Architecture, sizes: CacheSizes) -> CachePlan:
        """The cache of the size that is asked for. A `ValueError` if the source has none such."""

    def choose(self, job: ConversionJob, plan: CachePlan) -> CachePlan:
        """The plan to convert with: what was left open is settled by whatever the preset measures first."""
        return plan

    @abstractmethod
    def layers(self, job: ConversionJob, plan: CachePlan) -> Iterator[ConvertedLayer]:
        """The converted layers one by one, so that memory holds one at a time."""

    @abstractmethod
    def mla_fields(self, source: PreTrainedConfig, plan: CachePlan) -> dict[str, Any]:
        """The fields of the converted model's config that the plan does not have: `qk_nope_head_dim` and
        `num_nope_key_heads`."""

    def mla_config(self, source: Architecture, plan: CachePlan, **others: Any) -> LatentConfigMixin:
        """The converted model's config; `others` are the fields that follow neither from the source's nor the plan:
        `attention_bias`, `dtype`."""
        return source.mla_config(
            kv_lora_rank=plan.kv_lora_rank,
            qk_rope_head_dim=plan.qk_rope_head_dim,
            num_rope_key_heads=plan.num_rope_key_heads,
            **self.mla_fields(source.config, plan),
            **others,
        )

    @abstractmethod
    def card_rows(self) -> dict[str, str]:
        """Rows of the model card's table of the recipe."""
