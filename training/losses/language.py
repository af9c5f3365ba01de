"""Cross-entropy of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import LogitsLoss, Loss

if TYPE_CHECKING:
    import torch


@dataclass
class Language(LogitsLoss):
    """Has what the losses that share with it leave of 1; alone in evaluation."""

    @property
    def weight(self) -> float:
        return 1.0

    def weight_beside(self, losses: Sequence[Loss]) -> float:
        return self.weight - sum(loss.weight for loss in losses if loss.shares)

    def compute(
        self, logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None
    ) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        from ..packing import IGNORED

        return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

    def describe(self, teacher: str | None) -> str:
        return "cross-entropy"
