"""What conversion cost and what it bought."""

from .measures.agreement import Agreement, measure_agreement
from .measures.items import read_items
from .measures.long_context import PositionRange, Retrieval, measure_position_perplexity, measure_retrieval
from .measures.multiple_choice import (
    MultipleChoice,
    choice_bytes,
    measure_multiple_choice,
    preference_error,
    score_choices,
)
from .measures.perplexity import Perplexity, measure_perplexity, measure_text_perplexity

__all__ = [
    "Agreement",
    "MultipleChoice",
    "Perplexity",
    "PositionRange",
    "Retrieval",
    "choice_bytes",
    "measure_agreement",
    "measure_multiple_choice",
    "measure_perplexity",
    "measure_position_perplexity",
    "measure_retrieval",
    "measure_text_perplexity",
    "preference_error",
    "read_items",
    "score_choices",
]
