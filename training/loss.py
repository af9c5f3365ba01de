"""What recovery minimises: cross-entropy, the distance to the original's predictions, or to its attention's outputs.

The model's `forward` is bound to the instance so that it gives the loss and never the logits: those are the largest
tensors of a small model, and are made, used and made again for the backward pass a chunk of tokens at a time. Inside
`forward` the hooks of DDP, FSDP2, ZeRO, peft and autocast are all at work, and the head is called as the module that
it is, once for all chunks, so adapters and tied or sharded weights need no special case.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mha2mla.common.robust_error import robust_error, robust_errors

from .packing import IGNORED, packed_inputs

# Logits in memory at a time. Fused, they are held in 16 bits and few copies, and larger pieces are faster: weights are
# cast, and their gradients added up, once a piece.
CHUNK_LOGITS = 2**26
COMPILED_CHUNK_LOGITS = 2**28


@dataclass
class RecoveryOutput(ModelOutput):
    """
    Attributes:
        loss (`torch.Tensor`): Scalar, in nats per predicted token.
        log_likelihoods (`torch.Tensor`, *optional*): Of each label given the tokens before it, [B, T], 0 where a label
            does not count; outside training only.
    """

    loss: torch.Tensor | None = None
    log_likelihoods: torch.Tensor | None = None


@dataclass(frozen=True)
class Distillation:
    """
    The original model as a teacher.

    Attributes:
        teacher (`PreTrainedModel`): With the student's vocabulary; on the student's device; not trained.
        weight (`float`): Of the distance to the teacher, 0 to 1; cross-entropy has the rest.
        temperature (`float`): Divides both models' logits.
        hidden_weight (`float`): Of [`hidden_errors`], which are added.
    """

    teacher: PreTrainedModel
    weight: float = 0.5
    temperature: float = 1.0
    hidden_weight: float = 0.0


def forward_kl(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    KL(teacher, student) at a temperature, in nats, times its square, which keeps the size of the gradient as the
    temperature rises (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher_logits (`torch.Tensor`): fp32, [N, V].

    Returns:
        [N].
    """
    student = (logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    return nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


Head = Callable[..., torch.Tensor]  # from hidden states [N, D] to logits [N, V]


def chunk_losses(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher_head: Head | None,
    teacher_hidden: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`token_losses`] of so few tokens that their logits, [N, V] in fp32, may lie in memory."""
    logits = head(hidden).float()
    cross_entropy = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    if teacher_head is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_hidden).float()
    distance = forward_kl(logits, teacher_logits, temperature)
    return cross_entropy, distance.masked_fill(targets == IGNORED, 0)


@cache
def compiled_chunk_losses() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(chunk_losses)


def token_losses(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher_head: nn.Module | None = None,
    teacher_hidden: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross-entropy of each target and distance to the teacher, both 0 where the target is -100.

    Args:
        head (`nn.Module`): From hidden states to logits.
        hidden (`torch.Tensor`): Hidden states that predict the targets, [N, D].
        targets (`torch.Tensor`): Token ids or -100, [N].
        teacher_head, teacher_hidden (*optional*): The same of the teacher, [N, D of the teacher].
        chunk (`int`, *optional*): Tokens at a time; memory holds the logits of one chunk. By default a power of two,
            with some 2^26 logits, or 2^28 if compiled.
        compiled (`bool`): Fuse what follows the heads by `torch.compile`: the logits are then read a few times instead
            of some twenty.

    Returns:
        Two tensors [N], fp32, in nats. Without a teacher the second is zero.
    """
    if chunk is None:
        most = COMPILED_CHUNK_LOGITS if compiled else CHUNK_LOGITS
        chunk = 2 ** int(math.log2(most / cast(int, head.out_features)))
    losses = compiled_chunk_losses() if compiled else chunk_losses

    def all_chunks(project: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = []
        for begin in range(0, len(targets), chunk):
            part = slice(begin, begin + chunk)
            teacher_part = None if teacher_hidden is None else teacher_hidden[part]
            inputs = (project, hidden[part], targets[part], teacher_head, teacher_part, temperature)
            # Not reentrant: the head's gradient is then summed over chunks before any hook of DDP or FSDP sees it.
            pieces.append(checkpoint(losses, *inputs, use_reentrant=False))
        cross_entropies, distances = zip(*pieces, strict=True)
        return torch.cat(cross_entropies), torch.cat(distances)

    return call_once(head, all_chunks, hidden)


def call_once(head: nn.Module, function: Callable[[Head, torch.Tensor], Any], hidden: torch.Tensor) -> Any:
    """
    `function(forward of the head, hidden)` within one call of the head, whose hooks run before it and behind it: those
    that shard the head expect one call a pass (FSDP2 up to torch 2.11 frees the weights between two in backward).
    """
    forward, own = head.forward, head.__dict__.get("forward")
    head.forward = lambda hidden: function(forward, hidden)
    try:
        return head(hidden)
    finally:
        del head.forward
        if own is not None:
            head.forward = own


@contextmanager
def recorded_calls(modules: Iterable[nn.Module]) -> Iterator[list[tuple[dict, Any]]]:
    """Collects keyword arguments and output of every call of the modules, in order."""
    calls: list[tuple[dict, Any]] = []

    def record(module, args, kwargs, output):
        calls.append((kwargs, output))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@cache
def compiled_robust_errors() -> Callable[..., torch.Tensor]:
    return torch.compile(robust_errors)


def hidden_errors(
    states: list[torch.Tensor], teacher_states: list[torch.Tensor], compiled: bool = False
) -> torch.Tensor:
    """
    Relative error of the residual stream behind each layer, the mean over layers: the layer-wise part of SquareHead
    (Kurtic et al., arXiv 2310.06927), but relative for each token by itself, as a few tokens have states hundreds of
    times larger than all others (see `robust_errors`).

    Args:
        states, teacher_states (`list[torch.Tensor]`): A tensor [B, T, D] for each layer.

    Returns:
        Of each token, [B * T].
    """
    errors = compiled_robust_errors() if compiled else robust_errors
    pairs = zip(states, teacher_states, strict=True)
    return torch.stack([errors(state.float(), wanted.float()) for state, wanted in pairs]).mean(0).flatten()


def use_language_loss(
    model: PreTrainedModel, distillation: Distillation | None = None, compiled: bool = False
) -> None:
    """
    Let `model(input_ids, position_ids, labels, num_items_in_batch)` give a [`RecoveryOutput`]: cross-entropy mixed
    with the distance to the teacher in training, cross-entropy alone in evaluation.

    Args:
        model (`PreTrainedModel`): A causal language model with a decoder `model` and a head `lm_head`, before peft,
            DDP or FSDP wrap it. Only this instance changes; `del model.forward` undoes it.
        distillation (`Distillation`, *optional*): The teacher.
        compiled (`bool`): See [`token_losses`].
    """

    def forward(self, input_ids, position_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        teacher = distillation if self.training else None
        match_hidden = teacher is not None and teacher.hidden_weight > 0
        with recorded_calls(self.model.layers if match_hidden else ()) as calls:
            hidden = self.model(**packed_inputs(self, input_ids, position_ids), **kwargs).last_hidden_state
        # The state at t predicts the label at t + 1; the last one predicts nothing.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        teacher_head = teacher_hidden = None
        if teacher is not None:
            teacher_head = teacher.teacher.lm_head
            teacher_layers = teacher.teacher.model.layers if match_hidden else ()
            with torch.no_grad(), recorded_calls(teacher_layers) as teacher_calls:
                inputs = packed_inputs(teacher.teacher, input_ids, position_ids)
                teacher_hidden = teacher.teacher.model(**inputs).last_hidden_state.flatten(0, 1)
        cross_entropy, distance = token_losses(
            self.lm_head,
            hidden.flatten(0, 1),
            targets,
            teacher_head,
            teacher_hidden,
            1.0 if teacher is None else teacher.temperature,
            compiled=compiled,
        )
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy.sum() / count
        if teacher is not None:
            loss = (1 - teacher.weight) * loss + teacher.weight * distance.sum() / count
            if match_hidden:
                outputs, wanted = ([output for _, output in each] for each in (calls, teacher_calls))
                errors = hidden_errors(outputs, wanted, compiled)
                loss = loss + teacher.hidden_weight * errors.masked_fill(targets == IGNORED, 0).sum() / count
        if self.training:
            return RecoveryOutput(loss=loss)
        log_likelihoods = -cross_entropy.view_as(labels)  # of the label one place further on
        return RecoveryOutput(loss=loss, log_likelihoods=log_likelihoods.roll(1, dims=1))

    model.forward = MethodType(forward, model)


def attention_error(
    student: PreTrainedModel, teacher: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """
    Mean over layers of the relative error of the attention output, each of the student's attention layers reading what
    the teacher's reads (see `robust_error`).

    Args:
        student, teacher (`PreTrainedModel`): Of equal depth, width, rotary table and attention implementation.
        input_ids, position_ids (`torch.Tensor`): [B, T].

    Returns:
        A scalar. Only the student's attention gets a gradient.
    """
    with torch.no_grad(), recorded_calls(layer.self_attn for layer in teacher.model.layers) as calls:
        teacher.model(**packed_inputs(teacher, input_ids, position_ids))
    errors = [
        robust_error(layer.self_attn(**kwargs)[0].float(), wanted[0].float())
        for layer, (kwargs, wanted) in zip(student.model.layers, calls, strict=True)
    ]
    return torch.stack(errors).mean()


def use_attention_loss(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let `model(...)` give [`attention_error`] in training; in evaluation cross-entropy, as [`use_language_loss`]."""
    use_language_loss(model)
    evaluate = model.forward

    def forward(self, input_ids, position_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if not self.training:
            return evaluate(input_ids, position_ids, labels, num_items_in_batch, **kwargs)
        loss = attention_error(self, teacher, input_ids, position_ids)
        if num_items_in_batch is not None:  # a batch weighs what it has of the labels of all accumulated batches
            loss = loss * (labels != IGNORED).sum() / num_items_in_batch
        return RecoveryOutput(loss=loss)

    model.forward = MethodType(forward, model)
