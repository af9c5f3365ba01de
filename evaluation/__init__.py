"""What conversion cost and what it bought."""

from importlib import import_module
from typing import TYPE_CHECKING

# Where each name lives; imported when it is first asked for, so that `mha2mla eval --help` does without torch.
_HOMES = {
    "Agreement": "agreement",
    "MultipleChoice": "multiple_choice",
    "Perplexity": "perplexity",
    "PositionRange": "long_context",
    "Retrieval": "long_context",
    "choice_bytes": "multiple_choice",
    "measure_agreement": "agreement",
    "measure_multiple_choice": "multiple_choice",
    "measure_perplexity": "perplexity",
    "measure_position_perplexity": "long_context",
    "measure_retrieval": "long_context",
    "measure_text_perplexity": "perplexity",
    "preference_error": "multiple_choice",
    "read_items": "items",
    "score_choices": "multiple_choice",
}

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
else:  # hidden from type checkers, to which it would say that any name is there

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.measures.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
