"""Recovery fine-tuning of converted checkpoints on the stock Trainer."""

from typing import TYPE_CHECKING

from mha2mla.common.lazy import lazy_names

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
    from .saved_dtype import restore_dtype as restore_dtype
    from .trainer import RecoveryTrainer as RecoveryTrainer
    from .trainer import recover as recover
    from .trainer import round_entries as round_entries
    from .trainer_arguments import RecoveryTrainingArguments as RecoveryTrainingArguments
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
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
            "restore_dtype": "saved_dtype",
            "round_entries": "trainer",
            "use_losses": "loss",
        },
    )
