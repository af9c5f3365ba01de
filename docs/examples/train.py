"""Recovery fine-tuning as a script to read and change; `mha2mla train` does the same with more checks.

python docs/examples/train.py --model llama-mla --data texts.jsonl --output recovered --bf16
python docs/examples/train.py --config run.yaml --teacher meta-llama/Llama-2-7b-hf --trainable lora
accelerate launch --config_file docs/examples/accelerate/fsdp2.yaml docs/examples/train.py --config run.yaml
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

import mha2mla.modeling  # noqa: F401  # registers the family: no trust_remote_code needed
from mha2mla.cli.train import parse_arguments
from mha2mla.training import (
    RecoveryTrainer,
    add_lora,
    collate_packed,
    describe_trainable,
    freeze_except,
    restore_dtype,
    round_entries,
    use_losses,
)
from mha2mla.training.data import load_rows
from mha2mla.training.int8 import hold_in_int8


def main(argv: list[str]) -> None:
    model_args, loss_args, data_args, training_args = parse_arguments(argv)
    set_seed(training_args.seed)  # of LoRA's first weights and dropout

    # Data: documents packed into rows of one length, shuffled once.
    tokenizer = AutoTokenizer.from_pretrained(model_args.model)
    with training_args.main_process_first():
        train_rows, eval_rows = load_rows(data_args, tokenizer, training_args.seed)

    # Models: the converted one, and the original as its teacher.
    def load(path: str, dtype: str) -> torch.nn.Module:
        attention = model_args.attn_implementation
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)

    model = load(model_args.model, model_args.dtype)
    use_cache = model.config.use_cache
    teacher = None
    if loss_args.teacher is not None:
        teacher = load(loss_args.teacher, "bfloat16" if training_args.bf16 else model_args.dtype)
        if loss_args.teacher_int8:
            hold_in_int8(teacher)
        teacher.requires_grad_(False).eval().to(training_args.device)

    # The loss, bound to the model: cross-entropy and distances to the teacher, a chunk of logits at a time.
    use_losses(model, loss_args.losses, teacher)
    if model_args.kv_cache_dtype == "fp8":
        round_entries(model)  # in training alone

    # What trains.
    trained = model
    if model_args.trainable == "lora":
        rank, alpha, dropout = model_args.lora_rank, model_args.lora_alpha, model_args.lora_dropout
        trained = add_lora(model, rank, alpha, dropout, model_args.lora_targets)
    else:
        freeze_except(model, model_args.trainable)
    print(describe_trainable(trained))

    trainer = RecoveryTrainer(
        trained,
        training_args,
        data_collator=collate_packed,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    model.config.use_cache = use_cache  # the Trainer turns it off, and would save it so
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.process_index == 0 and model_args.trainable != "lora":
        restore_dtype(Path(training_args.output_dir), AutoConfig.from_pretrained(model_args.model).dtype)
    trainer.accelerator.end_training()  # closes the process group


if __name__ == "__main__":
    main(sys.argv[1:])
