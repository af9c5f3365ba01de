"""The distance to the original's attention, layer by layer: a first stage, in a run of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .base import Batch, BatchLoss, Setting, recorded_calls

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

OBJECTIVES = ("language", "attention")


def attention_errors(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """
    Relative error of what attention adds to the residual stream, the mean over layers, each of the student's attention
    layers reading what the teacher's reads (see [`robust_errors`]).

    Args:
        student, teacher (`PreTrainedModel`): Of equal depth, width, rotary table and attention implementation.
        input_ids, position_ids (`torch.Tensor`): [B, T].

    Returns:
        Of each token, [B * T]. Only the student's attention gets a gradient.
    """
    import torch

    from mha2mla.common.robust_error import robust_errors

    from ..packing import packed_inputs
    from ..teacher import attention_factor

    factor = attention_factor(teacher.config)
    with torch.no_grad(), recorded_calls(layer.self_attn for layer in teacher.model.layers) as calls:
        teacher.model(**packed_inputs(teacher, input_ids, position_ids))
    errors = [
        robust_errors(layer.self_attn(**kwargs)[0].float(), factor * wanted[0].float())
        for layer, (kwargs, wanted) in zip(student.model.layers, calls, strict=True)
    ]
    return torch.stack(errors).mean(0).flatten()


@dataclass
class Attention(BatchLoss):
    """See [`attention_errors`]."""

    objective: Literal["language", "attention"] = field(
        default="language",
        metadata={
            "help": "language: cross-entropy, mixed with the distances to the teacher if there is one. attention: the "
            "output of each attention layer is matched to the teacher's; a first stage, in a run of its own."
        },
    )

    needs_teacher = True
    alone = True

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} must be {' or '.join(OBJECTIVES)}.")

    @property
    def weight(self) -> float:
        return float(self.objective == "attention")

    def check(self, setting: Setting) -> None:
        if self.objective != "attention":
            return

        from mha2mla.common.loading import head_dim

        if setting.teacher_config is None:
            raise ValueError("objective='attention' matches a teacher: give --teacher, the original model.")
        if setting.sharded:
            raise ValueError(
                "objective='attention' calls layers one by one, which sharding cannot follow. Use plain DDP."
            )
        outside = [name for name in setting.trained if ".self_attn." not in name]
        if outside:
            raise ValueError(
                f"objective='attention' gives a gradient to attention only, but {outside[0]} would be trained too. "
                "Say --trainable self_attn, or --trainable lora with targets in attention."
            )
        setting.check_same(
            "objective='attention'",
            num_hidden_layers=lambda config: config.num_hidden_layers,
            hidden_size=lambda config: config.hidden_size,
            head_dim=head_dim,
        )

    def compute(self, batch: Batch) -> torch.Tensor:
        assert batch.teacher is not None
        errors = attention_errors(batch.student, batch.teacher, batch.input_ids, batch.position_ids)
        return errors.masked_fill(~batch.counted, 0).sum()

    def describe(self, teacher: str | None) -> str:
        return f"relative error of the attention outputs, as {teacher} has them"
