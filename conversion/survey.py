"""What each size of the cache would cost and bring, from a model's config alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from mha2mla.common.kernel_sizes import ENGINES, KERNEL_HEAD_DIM, KERNEL_ROPE_DIM, Engine
from mha2mla.common.loading import keys_values_width
from mha2mla.modeling import LatentConfigMixin

from .architectures import Architecture, architecture_of
from .cache_plan import SERVED_BYTES, CachePlan
from .cache_sizes import CacheSizes
from .export.deepseek import stock_config, tiny_gauge
from .export.engines import describe_engines, expressible_lists, fitting_engines
from .export.plan import ExportPlan
from .export.rope_table import RopeTable
from .output import empty_model
from .presets.calibrated import Calibrated
from .presets.calibrated.frequency_lists import two_runs
from .rotary import num_rotary_pairs
from .weights_check import expected_tensors

PAPER_RATIOS = (0.3125, 0.1875, 0.125)
# Of a GPU's memory, for weights and cache; the rest is for activations and the engine itself.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Offer:
    """
    A cache that the model can have.

    Attributes:
        title (`str`): What it is called: "original", "31.25 %", "512 + 64".
        sizes (`str`): Of latent and rotary key.
        width (`int`): Values per token and layer.
        num_layers (`int`): Layers.
        num_parameters (`int`): Of the model that has the cache: of its export, where an engine's kernels have this
            very cache, and else of the converted model.
        takers (`tuple[Engine, ...]`): Engines that take an export as it is, without padding.
        engines (`str`): Which engines take an export and how, for a person; empty for the original.
        options (`tuple[str, ...]`): Of `mha2mla convert`, that ask for it.
    """

    title: str
    sizes: str
    width: int
    num_layers: int
    num_parameters: int
    takers: tuple[Engine, ...] = ()
    engines: str = ""
    options: tuple[str, ...] = ()

    def bytes_per_token(self, element_size: int) -> int:
        """Of the cache, with `element_size` bytes a value."""
        return self.width * self.num_layers * element_size

    @property
    def weight_bytes(self) -> int:
        """Of the model, as it is served."""
        return SERVED_BYTES * self.num_parameters

    def tokens_in(self, memory: int, element_size: int) -> int:
        """Tokens whose cache fits beside the weights into a GPU of `memory` bytes; 0 where the weights do not. vLLM
        0.25.1 has room for 1 to 3 % less on an H100 (docs/serving.md)."""
        room = int(MEMORY_SHARE * memory) - self.weight_bytes
        return max(0, room) // self.bytes_per_token(element_size)


class EmptyTensors(dict[str, torch.Tensor]):
    """The tensors that a model of a config has, by name and without memory: a `TensorSource`."""

    def get(self, name: str) -> torch.Tensor:  # type: ignore[override]  # one that is missing is an error
        return self[name]

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Survey:
    """
    Attributes:
        original (`Offer`): The model as it is.
        offers (`list[Offer]`): What the preset `calibrated` can make of it.
        refused (`dict[str, str]`): Why other sizes cannot be had, by their titles.
    """

    original: Offer
    offers: list[Offer]
    refused: dict[str, str]


def survey_caches(config: PreTrainedConfig) -> Survey:
    """
    The paper's three ratios, and the sizes that kernels of inference engines are made for.

    Args:
        config (`PreTrainedConfig`): Of the source.

    Raises:
        ValueError: If a model of such a config cannot be converted, with the field and the remedy.
    """
    source = architecture_of(config)
    tensors, tied = expected_tensors(config)
    weights = EmptyTensors(tensors)
    num_parameters = sum(tensor.numel() for name, tensor in tensors.items() if name not in tied)
    width = keys_values_width(config)
    original = Offer("original", "", width, config.num_hidden_layers, num_parameters)
    offers, refused = [], {}
    for title, sizes in sizes_to_show():
        try:
            offers.append(make_offer(source, title, sizes, source.has_attention_bias(weights)))
        except ValueError as reason:
            refused[title] = str(reason)
    return Survey(original, offers, refused)


def sizes_to_show() -> Iterator[tuple[str, CacheSizes]]:
    for ratio in PAPER_RATIOS:
        yield f"{100 * ratio:g} %", CacheSizes(cache_ratio=ratio)
    for rank in ENGINES["vllm"].kernel_ranks:
        sizes = CacheSizes(kv_lora_rank=rank, qk_rope_head_dim=KERNEL_ROPE_DIM)
        yield f"{rank} + {KERNEL_ROPE_DIM}", sizes


def make_offer(source: Architecture, title: str, sizes: CacheSizes, attention_bias: bool) -> Offer:
    """A `ValueError` if the source cannot have such a cache, or if it is no smaller than its own."""
    preset = Calibrated(rope_layout="shared", rope_frequencies="common")
    source_width = keys_values_width(source.config)
    if sizes.kv_lora_rank is not None and sizes.kv_lora_rank + KERNEL_ROPE_DIM >= source_width:
        raise ValueError(f"The source caches {source_width} values per token and layer: there is nothing to gain.")
    plan = preset.plan(source, sizes)
    config = preset.mla_config(source, plan, attention_bias=attention_bias)
    split = f"{plan.kv_lora_rank} + {plan.qk_rope_head_dim}"
    pairs, engines = engines_of(source, plan, config)
    takers = tuple(engine for engine, rank in pairs if rank is None)
    num_parameters = empty_model(as_served(config, pairs)).num_parameters()
    given = {f"--{name.replace('_', '-')}": value for name, value in vars(sizes).items() if value is not None}
    options = tuple(str(word) for pair in given.items() for word in pair)
    return Offer(title, split, plan.width, plan.num_layers, num_parameters, takers, engines, options)


def as_served(config: Any, takers: list[tuple[Engine, int | None]]) -> PreTrainedConfig:
    """The config of the export that engines with kernels of the model's very cache hold in memory, which has more
    weights: heads are padded, values are not shared by heads, and the head is not tied. Without such an engine, the
    model's own."""
    if config.qk_rope_head_dim != KERNEL_ROPE_DIM or not any(
        engine.kernel_ranks and rank in (None, config.kv_lora_rank) for engine, rank in takers
    ):
        return config
    table = RopeTable({0: 0})  # whichever it is: weights do not depend on it
    plan = ExportPlan(table, config.kv_lora_rank, KERNEL_ROPE_DIM, KERNEL_HEAD_DIM, KERNEL_HEAD_DIM)
    return stock_config(config, plan, tiny_gauge(config.rms_norm_eps), torch.bfloat16)


def engines_of(
    source: Architecture, plan: CachePlan, config: LatentConfigMixin
) -> tuple[list[tuple[Engine, int | None]], str]:
    """The engines that take the plan with one of the lists of frequencies among which measurement will choose, as
    [`fitting_engines`] gives them, and for a person."""
    lists = list(two_runs(plan.qk_rope_head_dim // 2, num_rotary_pairs(source.config)))
    try:
        pairs = fitting_engines(config, lambda engine: any(map(expressible_lists(config, engine), lists)))
    except ValueError as reason:
        return [], f"none. {reason}"
    said = describe_engines(pairs, plan.source_width) or "none. They have no rotary table of so many frequencies."
    return pairs, said
