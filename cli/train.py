"""Recover what conversion lost: fine-tune a converted checkpoint on the stock Trainer.

    mha2mla train --model llama-mla --data texts.jsonl --output llama-mla-recovered --bf16
    mha2mla train --model llama-mla --data paper --streaming --max-steps 18000 --teacher meta-llama/Llama-2-7b-hf \\
        --output llama-mla-recovered --bf16
    mha2mla train --config run.yaml --trainable lora --merge
    accelerate launch --config_file fsdp2.yaml -m mha2mla.cli.main train --config run.yaml

All arguments of transformers' TrainingArguments are there beside the ones for model, loss and data.
"""

from mha2mla.training.arguments import (
    DataArguments,
    LossArguments,
    ModelArguments,
    RecoveryTrainingArguments,
    TeacherArguments,
)
from mha2mla.training.losses import find_losses

from .parsing import parse


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, LossArguments, DataArguments, RecoveryTrainingArguments]:
    """The options of `mha2mla train`, those of every loss among them; see [`parse`]."""
    losses = find_losses()
    dataclasses = (ModelArguments, TeacherArguments, *losses.values(), DataArguments, RecoveryTrainingArguments)
    model, teacher, *chosen, data, training = parse(argv, "mha2mla train", *dataclasses, description=__doc__)
    return model, LossArguments(**vars(teacher), losses=dict(zip(losses, chosen, strict=True))), data, training


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)

    from mha2mla.training.run import close, train

    trainer = train(*arguments)
    if trainer is not None:
        close(trainer)
