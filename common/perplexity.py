"""Perplexity from summed losses, with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def perplexity_of(loss: float) -> float:
    """exp of a loss in nats; infinity where that is beyond a number, as a model that lost everything may have it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Perplexity:
    """
    Attributes:
        loss (`float`): Mean cross-entropy per predicted token, in nats.
        loss_stderr (`float`): Standard error of the loss over blocks (tokens of a block are not independent).
        num_tokens (`int`): Predicted tokens.
        num_bytes (`int`, *optional*): Length of the text in bytes (UTF-8), where it is known.
    """

    loss: float
    loss_stderr: float
    num_tokens: int
    num_bytes: int | None = None

    @classmethod
    def from_sums(cls, sums: Sequence[float], counts: Sequence[int], num_bytes: int | None = None) -> "Perplexity":
        """From the summed loss and the number of predicted tokens of each block; blocks may differ in size."""
        total, blocks = sum(counts), len(sums)
        loss = sum(sums) / total
        stderr = math.nan
        if blocks > 1:
            squares = sum((value - loss * count) ** 2 for value, count in zip(sums, counts, strict=True))
            stderr = math.sqrt(squares * blocks / (blocks - 1)) / total
        return cls(loss, stderr, total, num_bytes)

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.loss_stderr

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as the perplexity is not; NaN where the text's length is not known."""
        return self.loss * self.num_tokens / (math.log(2) * self.num_bytes) if self.num_bytes else math.nan

    def __str__(self) -> str:
        return f"{self.perplexity:.2f} ± {self.stderr:.2f}"
