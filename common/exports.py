"""What marks a folder as an output of `mha2mla export`, and what transformers says of one without need."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXPORT_RECORD_NAME = "export.json"
# transformers compares yarn's factor with a ratio of lengths, which is no matter in an export: lengths are whole
# numbers, and no two of them have the ratio that puts frequencies where they are.
WARNING = "The explicitly set RoPE scaling factor"


@contextmanager
def without_warning_of_factor(is_export: Callable[[], bool]) -> Iterator[None]:
    """
    Without that warning, which says that the config must be mended.

    Args:
        is_export (`Callable`): Whether the config is an export's; asked only when there is a warning.
    """

    def is_said(record: logging.LogRecord) -> bool:
        return not (record.getMessage().startswith(WARNING) and is_export())

    transformers_logger = logging.getLogger("transformers.modeling_rope_utils")
    transformers_logger.addFilter(is_said)
    try:
        yield
    finally:
        transformers_logger.removeFilter(is_said)
