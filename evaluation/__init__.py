"""What conversion cost and what it bought."""

from .agreement import Agreement, measure_agreement
from .items import read_items
from .long_context import PositionRange, Retrieval, measure_position_perplexity, measure_retrieval
from .multiple_choice import MultipleChoice, choice_bytes, measure_multiple_choice, preference_error, score_choices
from .perplexity import Perplexity, measure_perplexity, measure_text_perplexity

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
