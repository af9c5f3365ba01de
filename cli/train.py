"""Recover what conversion lost: fine-tune a converted checkpoint on the stock Trainer.

    mha2mla train --model llama-mla --data texts.jsonl --output llama-mla-recovered --bf16
    mha2mla train --model llama-mla --data paper --streaming --max-steps 18000 --teacher meta-llama/Llama-2-7b-hf \\
        --output llama-mla-recovered --bf16
    mha2mla train --config run.yaml --trainable lora --merge
    accelerate launch --config_file fsdp2.yaml -m mha2mla.cli.main train --config run.yaml

All arguments of transformers' TrainingArguments are there beside the ones for model, loss and data.
"""

from mha2mla.training.arguments import (
    ARGUMENTS,
    DataArguments,
    LossArguments,
    ModelArguments,
    RecoveryTrainingArguments,
)

from .parsing import parse


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, LossArguments, DataArguments, RecoveryTrainingArguments]:
    """The options of `mha2mla train`; see [`parse`]."""
    model, loss, data, arguments = parse(argv, "mha2mla train", *ARGUMENTS, description=__doc__)
    return model, loss, data, arguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)

    from mha2mla.training.run import close, train

    close(train(*arguments))
