"""All that the Trainer can be told."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from mha2mla.common.options import SEEDS, check_between, check_least

from .arguments import TrainerOptions

# What a recipe for a GPU asks for, taken back.
ON_CPU = "--use_cpu --bf16 false --attn_implementation sdpa --compile_layers false"


@dataclass
class RecoveryTrainingArguments(TrainerOptions, TrainingArguments):
    """transformers' `TrainingArguments`, all of them, with our defaults and additions."""

    def __post_init__(self):
        check_least(self, per_device_train_batch_size=1, per_device_eval_batch_size=1, gradient_accumulation_steps=1)
        check_least(self, learning_rate=0, weight_decay=0, adam_epsilon=0, dataloader_num_workers=0)
        check_between(self, decay_fraction=(0, 1), adam_beta1=(0, 1), adam_beta2=(0, 1), seed=SEEDS, data_seed=SEEDS)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay off: rows carry the lengths of their documents.")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} belongs to a loss of transformers, which is "
                "not used here. Leave it out."
            )
        if self.attention_learning_rate is not None and self.attention_learning_rate <= 0:
            raise ValueError(
                f"attention_learning_rate={self.attention_learning_rate} must be above 0; what is not to be trained, "
                "--trainable leaves out."
            )
        if self.compile_layers and self.torch_compile:
            raise ValueError("compile_layers and torch_compile both compile the decoder layers: choose one.")
        if self.bf16 and not self.use_cpu and not torch.accelerator.is_available():
            raise ValueError(f"bf16=True is for a GPU, and there is none. To try it on a CPU: {ON_CPU}.")
        super().__post_init__()
