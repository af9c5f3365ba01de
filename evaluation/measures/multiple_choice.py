"""Multiple choice by log-likelihood: the choice that the model finds likeliest after the context is its answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.evaluation.caches import DYNAMIC, CacheKind

from .items import Item, check_choices
from .scoring import encode_request, score_requests


@dataclass(frozen=True)
class MultipleChoice:
    """
    Attributes:
        accuracy (`float`): Share of items whose right choice has the highest log-likelihood.
        accuracy_norm (`float`): The same with log-likelihoods divided by the choices' lengths in bytes (UTF-8).
        stderr, stderr_norm (`float`): Standard errors over items; NaN for a single one.
        num_items (`int`): Items measured.
        right, right_norm (`str`): "1" or "0" for each item, in order: what [`paired_difference`] compares.
    """

    accuracy: float
    accuracy_norm: float
    stderr: float
    stderr_norm: float
    num_items: int
    right: str
    right_norm: str

    @classmethod
    def from_scores(
        cls, log_likelihoods: Sequence[Sequence[float]], num_bytes: Sequence[Sequence[int]], answers: Sequence[int]
    ) -> "MultipleChoice":
        """
        Args:
            log_likelihoods (`Sequence`): Of every choice of every item.
            num_bytes (`Sequence`): Lengths of the choices, in the same form.
            answers (`Sequence[int]`): Index of the right choice of each item.
        """
        plain, normalised = [], []
        for values, sizes, answer in zip(log_likelihoods, num_bytes, answers, strict=True):
            rates = per_byte(values, sizes)
            plain.append(float(values.index(max(values)) == answer))
            normalised.append(float(rates.index(max(rates)) == answer))
        right, right_norm = ("".join(f"{hit:.0f}" for hit in hits) for hits in (plain, normalised))
        errors = mean_stderr(plain), mean_stderr(normalised)
        return cls(mean(plain), mean(normalised), *errors, len(plain), right, right_norm)

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.4f} ± {self.stderr:.4f}, by length {self.accuracy_norm:.4f} ± {self.stderr_norm:.4f} "
            f"({self.num_items} items)"
        )


def per_byte(log_likelihoods: Sequence[float], num_bytes: Sequence[int]) -> list[float]:
    """Length-normalised log-likelihoods of an item's choices."""
    return [value / size for value, size in zip(log_likelihoods, num_bytes, strict=True)]


def mean_stderr(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired_difference(right: str, of_original: str) -> tuple[float, float]:
    """
    How much more often one model is right than another on the same items, and the standard error of that. Most items
    are right or wrong for both, so it is known far better than either accuracy.

    Args:
        right, of_original (`str`): As [`MultipleChoice`] has them, of the same items.
    """
    differences = [float(a) - float(b) for a, b in zip(right, of_original, strict=True)]
    return mean(differences), mean_stderr(differences)


def measure_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch_size: int = 8,
    cache_kind: CacheKind = DYNAMIC,
) -> MultipleChoice:
    """
    Accuracy on multiple-choice items, each choice scored as `" " + choice` after the context.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        items (`Sequence[dict]`): `{"id", "context", "choices", "answer"}`, as [`read_items`] gives them; the number
            of choices may differ from item to item.
        batch_size (`int`, *optional*, defaults to 8): Items at a time; their choices go through the model together.
        cache_kind (`CacheKind`): In what cache choices find the context.

    Raises:
        ValueError: If an item is malformed or longer than the model's context.
    """
    log_likelihoods = score_choices(model, tokenizer, items, batch_size, cache_kind)
    return MultipleChoice.from_scores(log_likelihoods, choice_bytes(items), [item["answer"] for item in items])


def choice_bytes(items: Sequence[Item]) -> list[list[int]]:
    """Length of every choice in bytes (UTF-8)."""
    return [[len(choice.encode()) for choice in item["choices"]] for item in items]


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch_size: int = 8,
    cache_kind: CacheKind = DYNAMIC,
) -> list[list[float]]:
    """
    Log-likelihood of every choice of every item, in nats. Arguments and errors are those of
    [`measure_multiple_choice`].
    """
    if not items:
        raise ValueError("There are no items to measure on.")
    requests = []
    for number, item in enumerate(items):
        name = str(item.get("id", number))
        check_choices(item, f"Item {name}")
        choices = [" " + choice for choice in item["choices"]]
        limit = model.config.max_position_embeddings
        requests.append(encode_request(tokenizer, name, item["context"], choices, limit))
    scores = score_requests(model, requests, batch_size, "Multiple choice", cache_kind)
    return [[score.log_likelihood for score in scored] for scored in scores]


def preference_error(
    log_likelihoods: Sequence[Sequence[float]],
    of_original: Sequence[Sequence[float]],
    num_bytes: Sequence[Sequence[int]],
) -> float:
    """
    How far a model's preferences among choices are from the original's: per byte, less each item's mean, the sum of
    squared differences over the sum of squares of the original's. 0 for the original itself, about 1 for a model that
    has no preference. It uses every score and not only the best one's index, so it is far less noisy than accuracy.

    Args:
        log_likelihoods, of_original (`Sequence`): Of every choice of every item.
        num_bytes (`Sequence`): Lengths of the choices, in the same form.
    """

    def preferences(values: Sequence[float], sizes: Sequence[int]) -> list[float]:
        rates = per_byte(values, sizes)
        middle = mean(rates)
        return [rate - middle for rate in rates]

    error = size = 0.0
    for values, wanted, sizes in zip(log_likelihoods, of_original, num_bytes, strict=True):
        for a, b in zip(preferences(values, sizes), preferences(wanted, sizes), strict=True):
            error, size = error + (a - b) ** 2, size + b**2
    return error / size if size else math.nan
