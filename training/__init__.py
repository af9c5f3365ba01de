"""Recovery fine-tuning of converted checkpoints on the stock Trainer."""

from .arguments import (
    DataArguments,
    LossArguments,
    ModelArguments,
    RecoveryTrainingArguments,
)
from .loss import RecoveryOutput, use_losses
from .losses import make_losses
from .packing import collate_packed, pack_documents
from .parameters import add_lora, describe_trainable, freeze_except
from .trainer import RecoveryTrainer, recover

__all__ = [
    "DataArguments",
    "LossArguments",
    "ModelArguments",
    "RecoveryOutput",
    "RecoveryTrainer",
    "RecoveryTrainingArguments",
    "add_lora",
    "collate_packed",
    "describe_trainable",
    "freeze_except",
    "make_losses",
    "pack_documents",
    "recover",
    "use_losses",
]
