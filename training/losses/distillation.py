"""The distance to the original's predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .base import LogitsLoss

if TYPE_CHECKING:
    import torch


def forward_kl(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    KL(teacher, student) at a temperature, in nats, times its square, which keeps the size of the gradient as the
    temperature rises (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher_logits (`torch.Tensor`): fp32, [N, V].

    Returns:
        [N].
    """
    from torch.nn.functional import kl_div

    student = (logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    return kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


@dataclass
class Distillation(LogitsLoss):
    """See [`forward_kl`]."""

    distillation_weight: float = field(
        default=0.5,
        metadata={"help": "With a teacher: share of the distance to its predictions in the loss, 0 to 1."},
    )
    temperature: float = field(default=1.0, metadata={"help": "distillation: divides both models' logits."})

    needs_teacher = True
    shares = True

    def __post_init__(self):
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight={self.distillation_weight} must lie between 0 and 1.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")

    @property
    def weight(self) -> float:
        return self.distillation_weight

    def compute(
        self, logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None
    ) -> torch.Tensor:
        assert teacher_logits is not None
        return forward_kl(logits, teacher_logits, self.temperature)

    def describe(self, teacher: str | None) -> str:
        return f"KL({teacher}, model) at temperature {self.temperature:g}"
