"""What recovery can minimise: one file a loss. A file added here is found by itself, its options included."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from mha2mla.common.discovery import defined_classes

from .base import Batch, BatchLoss, LogitsLoss, Loss, Setting

__all__ = ["Batch", "BatchLoss", "LogitsLoss", "Loss", "Setting", "find_losses", "make_losses", "weigh"]


def find_losses() -> dict[str, type[Loss]]:
    """The class of every loss by the name of its file."""
    found = defined_classes(__name__, __path__, Loss)  # type: ignore[type-abstract]
    return {made.__module__.rsplit(".", 1)[-1]: made for made in found if made.__module__ != f"{__name__}.base"}


def make_losses(**options: Any) -> dict[str, Loss]:
    """
    Every loss by its name, with options by theirs: `make_losses(distillation_weight=1.0, hidden_weight=4.0)`.

    Raises:
        ValueError: If there is no such option, or its value is out of range.
    """
    losses = {}
    for name, made in find_losses().items():
        own = {field.name for field in fields(made)}
        losses[name] = made(**{option: options.pop(option) for option in own & set(options)})
    if options:
        raise ValueError(f"There is no option {', '.join(options)} of a loss.")
    return losses


def weigh(losses: Iterable[Loss], with_teacher: bool) -> list[tuple[float, Loss]]:
    """The losses that a run minimises, with their weights: those of weight 0 are left out, those that match a teacher
    where there is none, and, beside one that is minimised alone, all others."""
    usable = [loss for loss in losses if with_teacher or not loss.needs_teacher]
    alone = [loss for loss in usable if loss.alone and loss.weight > 0]
    chosen = alone[:1] or [loss for loss in usable if not loss.alone]
    weighed = [(loss.weight_beside(chosen), loss) for loss in chosen]
    return [(weight, loss) for weight, loss in weighed if weight > 0]
