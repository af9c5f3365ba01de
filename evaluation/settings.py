"""What the numbers of an evaluation depend on."""

from dataclasses import dataclass, field

from mha2mla.common.options import SEEDS, check_between, check_least, settle_types


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What the numbers depend on. A results file is continued only under the same settings.

    Args:
        limit (`int`, *optional*): Items of each task at most; of a generated one, at each length.
        length (`int`, *optional*, defaults to 1024): Tokens of a window of perplexity tasks.
        stride (`int`, *optional*): Tokens that a window adds; a window's length if not given.
        long_length (`int`, *optional*, defaults to 4096): Tokens of a document in tasks of perplexity by position.
        agreement_length (`int`, *optional*, defaults to 512): Tokens of a text in agreement tasks.
        prompt_length (`int`, *optional*, defaults to 64): Tokens that are continued in agreement tasks.
        new_tokens (`int`, *optional*, defaults to 64): Greedy tokens in agreement tasks.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights and the cache; as they are saved.
        seed (`int`, *optional*, defaults to 0): Of generated prompts, and of what lm-evaluation-harness draws.
    """

    limit: int | None = field(default=None, metadata={"help": "Items of each task at most (`long:`: at each length)."})
    length: int = field(default=1024, metadata={"help": "Tokens of a window of perplexity tasks."})
    stride: int | None = field(default=None, metadata={"help": "Tokens that a window adds; its length if not given."})
    long_length: int = field(default=4096, metadata={"help": "Tokens of a document in `positions:` tasks."})
    agreement_length: int = field(default=512, metadata={"help": "Tokens of a text in `agreement:` tasks."})
    prompt_length: int = field(default=64, metadata={"help": "Tokens that are continued in `agreement:` tasks."})
    new_tokens: int = field(default=64, metadata={"help": "Greedy tokens in `agreement:` tasks."})
    dtype: str = field(default="auto", metadata={"help": "Of weights and cache: auto, float32, bfloat16, float16."})
    seed: int = field(default=0, metadata={"help": "Of `long:` tasks, and of what lm-evaluation-harness draws."})

    def __post_init__(self):
        settle_types(self)
        check_least(self, limit=1, length=1, stride=1, long_length=2)
        check_least(self, agreement_length=2, prompt_length=1, new_tokens=1)
        check_between(self, seed=SEEDS)
        if self.stride is not None and self.stride > self.length:
            raise ValueError(
                f"stride={self.stride} would leave out tokens between windows of length={self.length}: give at most "
                "that."
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
