"""Recovery fine-tuning of converted checkpoints on the stock Trainer."""

from .arguments import (
    ARGUMENTS,
    DataArguments,
    LossArguments,
    ModelArguments,
    RecoveryTrainingArguments,
)
from .loss import Distillation, RecoveryOutput, attention_error, use_attention_loss, use_language_loss
from .packing import collate_packed, pack_documents
from .parameters import add_lora, describe_trainable, freeze_except
from .trainer import RecoveryTrainer, recover

__all__ = [
    "ARGUMENTS",
    "DataArguments",
    "Distillation",
    "LossArguments",
    "ModelArguments",
    "RecoveryOutput",
    "RecoveryTrainer",
    "RecoveryTrainingArguments",
    "add_lora",
    "attention_error",
    "collate_packed",
    "describe_trainable",
    "freeze_except",
    "pack_documents",
    "recover",
    "use_attention_loss",
    "use_language_loss",
]
