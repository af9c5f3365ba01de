"""Recover what conversion lost: fine-tune a converted checkpoint on the stock Trainer.

    mha2mla train --model llama-mla --data texts.jsonl --output_dir llama-mla-recovered --bf16
    mha2mla train --model llama-mla --data paper --streaming --max_steps 18000 --teacher meta-llama/Llama-2-7b-hf \\
        --output_dir llama-mla-recovered --bf16
    mha2mla train --config run.yaml --trainable lora --merge
    accelerate launch --config_file fsdp2.yaml -m mha2mla.cli.main train --config run.yaml

All arguments of transformers' TrainingArguments are there beside the ones for model, loss and data; --config takes
them from a YAML file, and the command line overrules it.
"""

from argparse import RawDescriptionHelpFormatter

from mha2mla.training import parse_arguments
from mha2mla.training.run import close, train


def main(argv: list[str]) -> None:
    trainer = train(
        *parse_arguments(argv, prog="mha2mla train", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    )
    if trainer is not None:
        close(trainer)
