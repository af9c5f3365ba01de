"""What a loss is, and what it may read: once before the run, and of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class Loss:
    """
    A term of what is minimised. A subclass is a dataclass of its own options: a field with a `help` in its metadata is
    an argument of `mha2mla train`. It derives from [`LogitsLoss`] or [`BatchLoss`].

    Attributes:
        needs_teacher (`bool`): Whether it compares with the original model; without a teacher it is left out.
        alone (`bool`): Whether nothing else is minimised beside it.
        shares (`bool`): Whether its weight is a share of 1, the rest of which cross-entropy has; all others are added.
    """

    needs_teacher: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    shares: ClassVar[bool] = False

    @property
    def weight(self) -> float:
        """Its factor in the sum; 0 leaves it out."""
        raise NotImplementedError

    def weight_beside(self, losses: Sequence[Loss]) -> float:
        """The weight, given all losses of the run."""
        return self.weight

    def check(self, setting: Setting) -> None:
        """Raise a `ValueError`, with the value and the remedy, for what the user can get wrong; called for every loss
        before weights are read. What is wrong with a value by itself is for `__post_init__`."""

    def describe(self, teacher: str | None) -> str:
        """What it is, for the model card; its weight stands before it."""
        raise NotImplementedError


@dataclass
class LogitsLoss(Loss):
    """A loss of each token's logits, which are the largest tensors there are: made, used and made again for the
    backward pass a chunk of tokens at a time, once for all losses."""

    def compute(
        self, logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Args:
            logits, teacher_logits (`torch.Tensor`): fp32, [N, V]; the teacher's only if the loss needs one.
            targets (`torch.Tensor`): Token ids, or -100 where a token does not count, [N].

        Returns:
            In nats, [N]; what does not count is set to 0 afterwards.
        """
        raise NotImplementedError


@dataclass
class BatchLoss(Loss):
    """
    A loss of anything else.

    Attributes:
        reads_states (`bool`): Whether [`Batch`] is to keep the residual stream after each layer.
    """

    reads_states: ClassVar[bool] = False

    def compute(self, batch: Batch) -> torch.Tensor:
        """The sum over the tokens that count, a scalar."""
        raise NotImplementedError


@dataclass(frozen=True)
class Setting:
    """
    A run, as far as a loss looks at it before weights are read.

    Attributes:
        config (`PreTrainedConfig`): Of the model that is trained.
        teacher (`str`, *optional*): Name of the original model.
        teacher_config (`PreTrainedConfig`, *optional*): Its config.
        trained (`list[str]`): Names of the parameters that are trained, or of the modules that get adapters.
        sharded (`bool`): Whether FSDP or DeepSpeed shards the model.
        active (`list[Loss]`): Those that the run minimises.
    """

    config: PreTrainedConfig
    teacher: str | None
    teacher_config: PreTrainedConfig | None
    trained: list[str]
    sharded: bool
    active: list[Loss]

    def check_same(self, option: str, **values: Callable[[PreTrainedConfig], Any]) -> None:
        """
        Args:
            option (`str`): What asks for it, for the message.
            values: Names of what both models must have alike, and how to read it in a config.

        Raises:
            ValueError: If they differ.
        """
        assert self.teacher_config is not None
        for name, read in values.items():
            theirs, ours = read(self.teacher_config), read(self.config)
            if theirs != ours:
                raise ValueError(
                    f"{option}: the teacher {self.teacher} has {name}={theirs}, the model {ours}. Give the model that "
                    "was converted."
                )


@dataclass
class Batch:
    """
    What a loss may read of a batch. Each model runs when something of it is first read.

    Attributes:
        student (`PreTrainedModel`): The model that is trained.
        teacher (`PreTrainedModel`, *optional*): The original.
        input_ids, position_ids (`torch.Tensor`): [B, T].
        targets (`torch.Tensor`): The token after each, or -100 where it does not count, [B * T].
        keep_states (`bool`): Whether `states` are asked for.
        compiled (`bool`): Whether to fuse what can be fused.
        options (`dict`): Further arguments of the student's decoder.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    targets: torch.Tensor
    keep_states: bool
    compiled: bool
    options: dict[str, Any]

    @property
    def counted(self) -> torch.Tensor:
        """Which tokens count, [B * T]."""
        from ..packing import IGNORED

        return self.targets != IGNORED

    @cached_property
    def _student_pass(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self._run(self.student, self.options)

    @cached_property
    def _teacher_pass(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        assert self.teacher is not None
        from torch import no_grad

        with no_grad():
            return self._run(self.teacher, {})

    def _run(self, model: PreTrainedModel, options: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        from ..packing import packed_inputs

        inputs = packed_inputs(model, self.input_ids, self.position_ids)
        with recorded_calls(model.model.layers if self.keep_states else ()) as calls:
            hidden = model.model(**inputs, **options).last_hidden_state
        return hidden.flatten(0, 1), [output for _, output in calls]

    @property
    def hidden(self) -> torch.Tensor:
        """What the student's head reads, [B * T, D]."""
        return self._student_pass[0]

    @property
    def teacher_hidden(self) -> torch.Tensor:
        """What the teacher's head reads, [B * T, D of the teacher]."""
        return self._teacher_pass[0]

    @property
    def states(self) -> list[torch.Tensor]:
        """The student's residual stream after each layer, [B, T, D] each."""
        return self._student_pass[1]

    @property
    def teacher_states(self) -> list[torch.Tensor]:
        """The teacher's residual stream after each layer, [B, T, D] each."""
        return self._teacher_pass[1]


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
