"""Recover what conversion lost: fine-tune a converted checkpoint on the stock Trainer.

    mha2mla train --model llama-mla --data texts.jsonl --output llama-mla-recovered --bf16
    mha2mla train --model llama-mla --data paper --streaming --max-steps 18000 --teacher meta-llama/Llama-2-7b-hf \\
        --output llama-mla-recovered --bf16
    mha2mla train --config run.yaml --trainable lora --merge
    accelerate launch --config_file fsdp2.yaml -m mha2mla.cli.main train --config run.yaml

Every option of transformers' TrainingArguments is there, too: --max_steps, --per_device_train_batch_size,
--gradient_accumulation_steps, --gradient_checkpointing, --save_steps, --eval_strategy, ... `--help-all` lists them.
"""

from typing import TYPE_CHECKING

from mha2mla.training.arguments import (
    DataArguments,
    LossArguments,
    ModelArguments,
    TeacherArguments,
    TrainerOptions,
)
from mha2mla.training.losses import find_losses

from .parsing import parse

if TYPE_CHECKING:  # it imports torch
    from mha2mla.training.trainer_arguments import RecoveryTrainingArguments

HELP, HELP_ALL = ("-h", "--help"), "--help-all"


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, LossArguments, DataArguments, "RecoveryTrainingArguments"]:
    """The options of `mha2mla train`, those of every loss among them; see [`parse`]."""
    losses = find_losses()
    dataclasses = (ModelArguments, TeacherArguments, *losses.values(), DataArguments, trainer_options(argv))
    argv = [HELP[-1] if word == HELP_ALL else word for word in argv]
    model, teacher, *chosen, data, training = parse(argv, "mha2mla train", *dataclasses, description=__doc__)
    return model, LossArguments(**vars(teacher), losses=dict(zip(losses, chosen, strict=True))), data, training


def trainer_options(argv: list[str]) -> type[TrainerOptions]:
    """All of them, or for --help, which is not to wait for torch, our own."""
    if set(HELP) & set(argv):
        return TrainerOptions

    from mha2mla.training.trainer_arguments import RecoveryTrainingArguments

    return RecoveryTrainingArguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)

    from mha2mla.training.run import close, train

    trainer = train(*arguments)
    if trainer is not None:
        close(trainer)
