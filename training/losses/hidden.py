"""The distance to the original's residual stream after each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from .base import Batch, BatchLoss, Setting

if TYPE_CHECKING:
    import torch


@cache
def compiled_robust_errors() -> Callable[..., torch.Tensor]:
    import torch

    from mha2mla.common.robust_error import robust_errors

    return torch.compile(robust_errors)


def hidden_errors(
    states: list[torch.Tensor], teacher_states: list[torch.Tensor], compiled: bool = False
) -> torch.Tensor:
    """
    Relative error of the residual stream after each layer, the mean over layers: the layer-wise part of SquareHead
    (Kurtic et al., arXiv 2310.06927), but relative for each token by itself, as a few tokens have states hundreds of
    times larger than all others (see [`robust_errors`]).

    Args:
        states, teacher_states (`list[torch.Tensor]`): A tensor [B, T, D] for each layer.

    Returns:
        Of each token, [B * T].
    """
    import torch

    from mha2mla.common.robust_error import robust_errors

    errors = compiled_robust_errors() if compiled else robust_errors
    pairs = zip(states, teacher_states, strict=True)
    return torch.stack([errors(state.float(), wanted.float()) for state, wanted in pairs]).mean(0).flatten()


@dataclass
class Hidden(BatchLoss):
    """See [`hidden_errors`]."""

    hidden_weight: float = field(
        default=0.0,
        metadata={
            "help": "With a teacher: weight of the distance between both models' states after each layer, added."
        },
    )

    needs_teacher = True
    reads_states = True

    def __post_init__(self):
        if not self.hidden_weight >= 0:
            raise ValueError(f"hidden_weight={self.hidden_weight} must be 0 or more.")

    @property
    def weight(self) -> float:
        return self.hidden_weight

    def check(self, setting: Setting) -> None:
        if self.weight > 0 and self not in setting.active:
            raise ValueError(
                f"hidden_weight={self.hidden_weight} adds to the distance to a teacher: give --teacher, the original "
                "model, and the objective language."
            )
        if self.weight > 0:
            setting.check_same(
                f"hidden_weight={self.hidden_weight}",
                num_hidden_layers=lambda config: config.num_hidden_layers,
                hidden_size=lambda config: config.hidden_size,
            )

    def compute(self, batch: Batch) -> torch.Tensor:
        errors = hidden_errors(batch.states, batch.teacher_states, batch.compiled)
        return errors.masked_fill(~batch.counted, 0).sum()

    def describe(self, teacher: str | None) -> str:
        return "relative error of the states after each layer"
