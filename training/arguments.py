"""What the user chooses: dataclasses, from the command line and from YAML alike; losses bring their own."""

from dataclasses import dataclass, field
from typing import Literal

from mha2mla.common.options import check_between, check_least

from .losses import Loss, make_losses, weigh


@dataclass
class ModelArguments:
    """The model, and what of it is trained."""

    model: str = field(metadata={"help": "Converted checkpoint: a folder, or a name on the Hub."})
    trainable: str = field(
        default="all",
        metadata={
            "help": "What trains: all; attention (with the norms; the rest is frozen); lora; or a regular expression "
            "that is looked for in the parameters' names."
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "lora: rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "lora: the adapters are scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "lora: dropout before the adapters."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "lora: names of the linear layers adapted; by default all those of attention."},
    )
    merge: bool = field(
        default=False, metadata={"help": "lora: also save the model with the adapter merged, in OUTPUT_DIR/merged."}
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Type of the weights in training: float32, with --bf16 for the arithmetic; see the docs. What is "
            "left of float32 has the converted model's type."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Of transformers: sdpa, eager, flex_attention, flash_attention_2, ..."}
    )
    kv_cache_dtype: Literal["auto", "fp8"] = field(
        default="auto",
        metadata={
            "help": "fp8: train on entries rounded as an engine's fp8 cache has them, which then costs a third or "
            "less. Evaluation and the saved model do not round."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code that the model or the teacher brings along to run here."}
    )

    def __post_init__(self):
        check_least(self, lora_rank=1, lora_alpha=1)
        check_between(self, lora_dropout=(0, 1))
        if self.merge and self.trainable != "lora":
            raise ValueError(f"merge belongs to --trainable lora; this run trains {self.trainable!r}.")


@dataclass
class TeacherArguments:
    """The original model, which losses may compare with."""

    teacher: str | None = field(default=None, metadata={"help": "The original model: a folder, or a name on the Hub."})
    teacher_int8: bool = field(
        default=False, metadata={"help": "Hold the matrices of the teacher's layers in 8 bits: half of its memory."}
    )

    def __post_init__(self):
        if self.teacher_int8 and self.teacher is None:
            raise ValueError("teacher_int8 needs --teacher: there is no model to hold in 8 bits.")


@dataclass
class LossArguments(TeacherArguments):
    """
    What is minimised.

    Attributes:
        losses (`dict[str, Loss]`): Every loss by its name, with its options; see [`make_losses`].
    """

    losses: dict[str, Loss] = field(default_factory=make_losses)

    @property
    def weighed(self) -> list[tuple[float, Loss]]:
        """The losses that count, with their weights."""
        return weigh(self.losses.values(), self.teacher is not None)

    def describe(self) -> str:
        """The weighted sum, for the model card."""
        teacher = f"{self.teacher} in 8 bits" if self.teacher_int8 else self.teacher
        terms = [(weight, loss.describe(teacher)) for weight, loss in self.weighed]
        return " + ".join(text if weight == 1 else f"{weight:g} {text}" for weight, text in terms)


@dataclass
class DataArguments:
    """The text."""

    data: str = field(
        metadata={
            "help": "A recipe (its name, or a .yaml file: a mixture with weights), OWNER/NAME of a data set on the "
            "Hub, or .txt, .jsonl, .json or .parquet files, compressed or not; patterns name several."
        }
    )
    column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the text, or of the messages of a chat; by default text, or messages where there is no "
            "text. A recipe has its own."
        },
    )
    subset: str | None = field(default=None, metadata={"help": "Configuration of the data set, if any."})
    split: str = field(default="train", metadata={"help": "Split of a data set from the Hub."})
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out text in the same form; perplexity is measured on it."}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Without --eval-data: share of the documents that is held out instead."}
    )
    length: int = field(default=2048, metadata={"help": "Tokens of a row; documents are packed without padding."})
    short_lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Row by row in turn, cut documents to so many tokens, for predictions from little text, and then "
            "leave a row whole: 256 cuts them in every second row."
        },
    )
    lookback_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the rows in which passages of the text return at the end, word by word, so that looking "
            "up is trained; see the docs."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training, without a copy on the disk."})
    shuffle_buffer: int = field(default=2000, metadata={"help": "streaming: rows among which the next is drawn."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise; not for streaming."})

    def __post_init__(self):
        check_least(self, length=2, shuffle_buffer=1, num_proc=1)
        if isinstance(self.short_lengths, int):
            raise ValueError(f"short_lengths={self.short_lengths} must be a list, such as [{self.short_lengths}].")
        for size in self.short_lengths or ():
            if not 2 <= size <= self.length:
                raise ValueError(f"short_lengths={self.short_lengths} must lie between 2 and length={self.length}.")
        check_between(self, lookback_share=(0, 1))
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must lie between 0 and 1.")
        if self.eval_fraction > 0 and self.eval_data is not None:
            raise ValueError("Give either eval_data or eval_fraction, not both.")
        if self.eval_fraction > 0 and self.streaming:
            raise ValueError("eval_fraction needs all documents at hand, which streaming does not: give --eval-data.")


@dataclass
class TrainerOptions:
    """Options that transformers' `TrainingArguments` lack, and those with other defaults: the paper's (arXiv
    2502.14837, Appendix A)."""

    output_dir: str = field(
        metadata={"help": "Folder of the trained model and its checkpoints.", "aliases": ["--output"]}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest rate, held through the stable phase."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW; the first is 0.9."})
    lr_scheduler_type: str = field(
        default="warmup_stable_decay", metadata={"help": "Shape of the learning rate over the run."}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or a share of all steps if below 1."})
    decay_fraction: float = field(
        default=0.1, metadata={"help": "warmup_stable_decay: last share of the steps, over which the rate falls."}
    )
    attention_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Highest rate of attention, which conversion made anew; by default learning_rate."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    logging_first_step: bool = field(
        default=True, metadata={"help": "A line for the first step alone: the loss of the conversion itself."}
    )
    include_num_input_tokens_seen: str = field(
        default="all", metadata={"help": "Count tokens and tokens per second: all, non_padding or no."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile one decoder layer, which serves all, and the loss: seconds, where --torch_compile takes "
            "minutes for the whole model."
        },
    )
    # Rows are shuffled once, by their seed alone, so that the order is the same on any number of processes.
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "Order of the shuffled rows."})
    # Whatever is trained has a part in the loss; looking for what has none would cost DDP a walk of the graph a step.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP: look for parameters without a gradient in each step."}
    )
    # Rows carry the lengths of their documents, which the collator needs and the model does not.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})
