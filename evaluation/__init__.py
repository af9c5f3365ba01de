"""What conversion cost and what it bought."""

from typing import TYPE_CHECKING

from mha2mla.common.lazy import lazy_names

if TYPE_CHECKING:
    from .measures.agreement import Agreement as Agreement
    from .measures.agreement import measure_agreement as measure_agreement
    from .measures.items import read_items as read_items
    from .measures.long_context import PositionRange as PositionRange
    from .measures.long_context import Retrieval as Retrieval
    from .measures.long_context import measure_position_perplexity as measure_position_perplexity
    from .measures.long_context import measure_retrieval as measure_retrieval
    from .measures.multiple_choice import MultipleChoice as MultipleChoice
    from .measures.multiple_choice import choice_bytes as choice_bytes
    from .measures.multiple_choice import measure_multiple_choice as measure_multiple_choice
    from .measures.multiple_choice import preference_error as preference_error
    from .measures.multiple_choice import score_choices as score_choices
    from .measures.perplexity import Perplexity as Perplexity
    from .measures.perplexity import measure_perplexity as measure_perplexity
    from .measures.perplexity import measure_text_perplexity as measure_text_perplexity
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Agreement": "measures.agreement",
            "MultipleChoice": "measures.multiple_choice",
            "Perplexity": "measures.perplexity",
            "PositionRange": "measures.long_context",
            "Retrieval": "measures.long_context",
            "choice_bytes": "measures.multiple_choice",
            "measure_agreement": "measures.agreement",
            "measure_multiple_choice": "measures.multiple_choice",
            "measure_perplexity": "measures.perplexity",
            "measure_position_perplexity": "measures.long_context",
            "measure_retrieval": "measures.long_context",
            "measure_text_perplexity": "measures.perplexity",
            "preference_error": "measures.multiple_choice",
            "read_items": "measures.items",
            "score_choices": "measures.multiple_choice",
        },
    )
