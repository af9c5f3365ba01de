"""Source architectures: one file each, found by itself. What differs from Llama is all that such a file says."""

from functools import cache

from transformers import PreTrainedConfig

from mha2mla.common.discovery import defined_classes

from .base import Architecture
from .refusals import refuse_model_type


@cache
def architecture_classes() -> tuple[type[Architecture], ...]:
    """All source architectures that can be converted; what several have in common has no model type."""
    return tuple(c for c in defined_classes(__name__, __path__, Architecture) if hasattr(c, "model_type"))


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """
    The architecture of a source.

    Raises:
        ValueError: If it cannot be converted; the message names the field and the remedy.
    """
    for architecture_class in architecture_classes():
        if architecture_class.accepts(config):
            return architecture_class(config)
    refuse_model_type(config, tuple(c.model_type for c in architecture_classes()))


__all__ = ["Architecture", "architecture_classes", "architecture_of"]
