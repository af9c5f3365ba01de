"""The loss of a run, a weighted sum of those in `losses/`, bound to the model.

The model's `forward` is bound to the instance so that it gives the loss and never the logits: those are the largest
tensors of a small model, and are made, used and made again for the backward pass a chunk of tokens at a time. Inside
`forward` the hooks of DDP, FSDP2, ZeRO, peft and autocast are all at work, and the head is called as the module that
it is, once for all chunks, so adapters and tied or sharded weights need no special case.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .losses import Batch, BatchLoss, LogitsLoss, Loss, weigh
from .losses.language import Language
from .packing import IGNORED
from .teacher import logits_factor

# Logits in memory at a time. Fused, they are held in 16 bits and few copies, and larger pieces are faster: weights are
# cast, and their gradients added up, once a piece.
CHUNK_LOGITS = 2**26
COMPILED_CHUNK_LOGITS = 2**28

Head = Callable[..., torch.Tensor]  # from hidden states [N, D] to logits [N, V]


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


def chunk_losses(
    losses: Sequence[LogitsLoss],
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher_head: Head | None,
    teacher_hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """[`token_losses`] of so few tokens that their logits, [N, V] in fp32, may lie in memory."""
    logits, teacher_logits = head(hidden).float(), None
    if teacher_head is not None:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden).float()
    ignored = targets == IGNORED
    return tuple(loss.compute(logits, targets, teacher_logits).masked_fill(ignored, 0) for loss in losses)


@cache
def compiled_chunk_losses() -> Callable[..., tuple[torch.Tensor, ...]]:
    return torch.compile(chunk_losses)


def token_losses(
    losses: Sequence[LogitsLoss],
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher_head: nn.Module | None = None,
    teacher_hidden: torch.Tensor | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> list[torch.Tensor]:
    """
    Losses of each target, 0 where it is -100.

    Args:
        losses (`Sequence[LogitsLoss]`): At least one.
        head (`nn.Module`): From hidden states to logits.
        hidden (`torch.Tensor`): Hidden states that predict the targets, [N, D].
        targets (`torch.Tensor`): Token ids or -100, [N].
        teacher_head, teacher_hidden (*optional*): The same of the teacher, [N, D of the teacher].
        chunk (`int`, *optional*): Tokens at a time; memory holds the logits of one chunk. By default a power of two,
            with some 2^26 logits, or 2^28 if compiled.
        compiled (`bool`): Fuse what follows the heads by `torch.compile`: the logits are then read a few times instead
            of some twenty.

    Returns:
        A tensor [N] a loss, fp32, in nats.
    """
    if chunk is None:
        most = COMPILED_CHUNK_LOGITS if compiled else CHUNK_LOGITS
        chunk = 2 ** int(math.log2(most / cast(int, head.out_features)))
    function = compiled_chunk_losses() if compiled else chunk_losses

    def all_chunks(project: Head, hidden: torch.Tensor) -> list[torch.Tensor]:
        pieces = []
        for begin in range(0, len(targets), chunk):
            part = slice(begin, begin + chunk)
            teacher_part = None if teacher_hidden is None else teacher_hidden[part]
            inputs = (losses, project, hidden[part], targets[part], teacher_head, teacher_part)
            # Not reentrant: the head's gradient is then summed over chunks before any hook of DDP or FSDP sees it.
            pieces.append(checkpoint(function, *inputs, use_reentrant=False))
        return [torch.cat(each) for each in zip(*pieces, strict=True)]

    return call_once(head, all_chunks, hidden)


def call_once(head: nn.Module, function: Callable[[Head, torch.Tensor], Any], hidden: torch.Tensor) -> Any:
    """
    `function(forward of the head, hidden)` within one call of the head, whose hooks run before and after it: those
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


def use_losses(
    model: PreTrainedModel,
    losses: Mapping[str, Loss],
    teacher: PreTrainedModel | None = None,
    compiled: bool = False,
) -> None:
    """
    Let `model(input_ids, position_ids, labels, num_items_in_batch)` give a [`RecoveryOutput`]: the weighted sum of the
    losses in training, cross-entropy alone in evaluation. Without labels the model answers as before.

    Args:
        model (`PreTrainedModel`): A causal language model with a decoder `model` and a head `lm_head`, before peft,
            DDP or FSDP wrap it. Only this instance changes; `del model.forward` undoes it.
        losses (`Mapping[str, Loss]`): As [`make_losses`] gives them; see [`weigh`] for which of them count.
        teacher (`PreTrainedModel`, *optional*): The original model, with the student's vocabulary; on the student's
            device; not trained.
        compiled (`bool`): See [`token_losses`].

    Raises:
        ValueError: If no loss is left.
    """
    training_terms = weigh(losses.values(), teacher is not None)
    if not training_terms:
        raise ValueError("There is nothing to minimise: every loss has a weight of 0, or lacks its teacher.")

    def forward(self, input_ids=None, position_ids=None, labels=None, num_items_in_batch=None, **options):
        if labels is None:  # somebody looks at what the model writes meanwhile
            return type(self).forward(self, input_ids=input_ids, position_ids=position_ids, **options)
        terms = training_terms if self.training else [(1.0, Language())]
        # The state at t predicts the label at t + 1; the last one predicts nothing.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        keep_states = any(isinstance(loss, BatchLoss) and loss.reads_states for _, loss in terms)
        batch = Batch(self, teacher, input_ids, position_ids, targets, keep_states, compiled, options)

        of_logits = [(weight, loss) for weight, loss in terms if isinstance(loss, LogitsLoss)]
        of_batch = [(weight, loss) for weight, loss in terms if isinstance(loss, BatchLoss)]
        values = logits_losses([loss for _, loss in of_logits], batch)
        weighed = [weight * each.sum() for (weight, _), each in zip(of_logits, values, strict=True)]
        weighed += [weight * loss.compute(batch) for weight, loss in of_batch]
        loss = cast(torch.Tensor, sum(each / count for each in weighed))
        if self.training:
            return RecoveryOutput(loss=loss)
        log_likelihoods = -values[0].view_as(labels)  # of the label one place further on
        return RecoveryOutput(loss=loss, log_likelihoods=log_likelihoods.roll(1, dims=1))

    model.forward = MethodType(forward, model)


def logits_losses(losses: Sequence[LogitsLoss], batch: Batch) -> list[torch.Tensor]:
    """[`token_losses`] of a batch, [B * T] each; without one, the student's decoder does not run for them."""
    if not losses:
        return []
    hidden = batch.hidden
    teacher_head = teacher_hidden = None
    if any(loss.needs_teacher for loss in losses):
        assert batch.teacher is not None
        teacher_head, teacher_hidden = batch.teacher.lm_head, batch.teacher_hidden
        factor = logits_factor(batch.teacher.config)
        if factor != 1:  # a head has no bias in any source, so what it reads may have its factor
            teacher_hidden = factor * teacher_hidden
    return token_losses(
        losses, batch.student.lm_head, hidden, batch.targets, teacher_head, teacher_hidden, compiled=batch.compiled
    )
