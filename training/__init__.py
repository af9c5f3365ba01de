"""Recovery fine-tuning of converted checkpoints on the stock Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING

# Where each name lives; imported when it is first asked for, so that `mha2mla train --help` does without torch.
_HOMES = {
    "DataArguments": "arguments",
    "LossArguments": "arguments",
    "ModelArguments": "arguments",
    "RecoveryOutput": "loss",
    "RecoveryTrainer": "trainer",
    "RecoveryTrainingArguments": "trainer_arguments",
    "add_lora": "parameters",
    "collate_packed": "packing",
    "describe_trainable": "parameters",
    "freeze_except": "parameters",
    "make_losses": "losses",
    "pack_documents": "packing",
    "recover": "trainer",
    "use_losses": "loss",
}

if TYPE_CHECKING:
    from .arguments import DataArguments as DataArguments
    from .arguments import LossArguments as LossArguments
    from .arguments import ModelArguments as ModelArguments
    from .loss import RecoveryOutput as RecoveryOutput
    from .loss import use_losses as use_losses
    from .losses import make_losses as make_losses
    from .packing import collate_packed as collate_packed
    from .packing import pack_documents as pack_documents
    from .parameters import add_lora as add_lora
    from .parameters import describe_trainable as describe_trainable
    from .parameters import freeze_except as freeze_except
    from .trainer import RecoveryTrainer as RecoveryTrainer
    from .trainer import recover as recover
    from .trainer_arguments import RecoveryTrainingArguments as RecoveryTrainingArguments
else:  # hidden from type checkers, to which it would say that any name is there

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
