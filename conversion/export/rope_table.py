"""Saying a model's rotary frequencies by what a DeepSeek config can say: one geometric table, with at most one step.

A frequency w of a source with base theta and head size d has the *place* -ln(w) d / (2 ln theta): its index where
nothing is scaled, a fraction or an index further back where llama3's or yarn's scaling has changed it. Slot i of a
stock table with `rope_theta` = theta^(s r/d) lies at place s*i, s being the stride and r the rotary dims. yarn with a
ramp between slots L and L + 1 moves everything after L back by ln(factor) d / (2 ln theta) places and leaves the rest
alone: a second run of frequencies. Slots that no frequency needs get zero weights.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.common.exports import WARNING

LENGTH_DEPENDENT = ("dynamic", "longrope")  # frequencies change with the length of the text
LARGEST_THETA = 1e37  # of a stock table, which engines compute in fp32
TOLERANCE = 1e-5  # of a place: transformers' tables are fp32
STEP_NOTE = (
    f'transformers warns when it loads the export ("{WARNING} ... does not match the ratio"). That is expected: '
    "yarn's factor does not stretch the context here, but puts the second run of frequencies in its place"
)


def frequency_places(config: PreTrainedConfig) -> torch.Tensor:
    """Place of every frequency of the model's own table, float64 [head_dim / 2]; whole numbers are exact."""
    frequencies = LlamaRotaryEmbedding(config).inv_freq.double()
    places = -frequencies.log() * len(frequencies) / math.log(config.rope_parameters["rope_theta"])
    whole = places.round()
    return torch.where((places - whole).abs() < TOLERANCE, whole, places)


@dataclass(frozen=True)
class RopeTable:
    """
    A stock table and where in it the model's frequencies lie.

    Attributes:
        slots (`dict[int, int]`): Slot of each frequency index of the source.
        stride (`int`): Places from slot to slot.
        last (`int`, *optional*): The slot before the step; none without a step.
        step (`float`): Places that slots after `last` lie further back.
    """

    slots: dict[int, int]
    stride: int = 1
    last: int | None = None
    step: float = 0.0

    @property
    def num_slots(self) -> int:
        return max(self.slots.values()) + 1

    def factor(self, theta: float, head_dim: int) -> float:
        """yarn's factor: what frequencies after the step are divided by."""
        return theta ** (2 * self.step / head_dim)

    def score_factor(self, theta: float, head_dim: int) -> float:
        """What engines multiply attention scores by where `mscale_all_dim` is 1 (DeepSeek-V2, arXiv 2405.04434)."""
        return 1.0 if self.last is None else (1 + 0.1 * math.log(self.factor(theta, head_dim))) ** 2

    def rope_parameters(
        self, theta: float, head_dim: int, qk_rope_head_dim: int, max_positions: int
    ) -> dict[str, Any]:
        """The entry `rope_parameters` of a DeepSeek config with `qk_rope_head_dim` rotary dims."""
        base = theta ** (self.stride * qk_rope_head_dim / head_dim)
        if self.last is None:
            return {"rope_type": "default", "rope_theta": base}
        factor = self.factor(theta, head_dim)
        # Engines make original * factor rows of cosines: one more than enough.
        original = math.ceil(max_positions / factor) + 1

        def beta(slot: float) -> float:
            """Turns within the original length of a frequency at this slot, from which engines find the slot again."""
            return original / (2 * math.pi) * base ** (-2 * slot / qk_rope_head_dim)

        return {
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": factor,
            "original_max_position_embeddings": original,
            # Engines round the ramp's ends outwards: to `last` and the slot after it.
            "beta_fast": beta(self.last + 0.25),
            "beta_slow": beta(self.last + 0.75),
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }


def grid(places: list[float], stride: int) -> list[int] | None:
    """Slots of places in a table with this stride, or None where one lies between slots."""
    slots = [round(place / stride) for place in places]
    return slots if all(abs(s * stride - p) < TOLERANCE for s, p in zip(slots, places, strict=True)) else None


def fit_table(
    places: torch.Tensor, frequencies: list[int], theta: float, allow_step: bool, num_slots: int | None = None
) -> RopeTable | None:
    """
    The smallest stock table that holds these frequencies, of several one without a step. Where there are `num_slots`
    in any case, the plainest that fits.

    Args:
        places (`torch.Tensor`): Of all frequencies of the source, [head_dim / 2], see [`frequency_places`].
        frequencies (`list[int]`): Indices into them, each once.
        theta (`float`): The source's base.
        allow_step (`bool`): Whether the engine knows yarn's step.
        num_slots (`int`, *optional*): Slots of the table, if they are given.

    Returns:
        The table, or None if there is none.
    """
    order = sorted(frequencies, key=lambda index: places[index].item())
    at = [places[index].item() for index in order]
    fits = []
    # All gaps but the one at the step are multiples of the stride, which the second smallest therefore bounds.
    gaps = sorted(b - a for a, b in pairwise(at))
    most = len(places) if len(gaps) < 2 else min(len(places), int(gaps[1] + TOLERANCE))
    for stride in range(1, most + 1):
        for size in range(len(at) + 1) if allow_step else [len(at)]:  # of the first run
            first = grid(at[:size], stride)
            second = grid([place - at[size] for place in at[size:]], stride) if size < len(at) else []
            if first is None or second is None:
                continue
            if not second:
                table = RopeTable(dict(zip(order, first, strict=True)), stride)
            else:
                last = first[-1] if first else 0
                step = at[size] - stride * (last + 1)
                if step <= 0:  # yarn's factor divides: it cannot move frequencies forward
                    continue
                slots = first + [last + 1 + slot for slot in second]
                table = RopeTable(dict(zip(order, slots, strict=True)), stride, last, step)
            slots_there = num_slots or table.num_slots
            if table.num_slots <= slots_there and theta ** (stride * slots_there / len(places)) < LARGEST_THETA:
                fits.append(table)

    def preference(table: RopeTable) -> tuple:
        plain = (table.last is not None, table.stride)
        return (table.num_slots, *plain) if num_slots is None else plain

    return min(fits, key=preference, default=None)
