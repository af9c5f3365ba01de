"""Ways to make MLA weights: one folder a preset, found by itself."""

from functools import cache

from ..discovery import defined_classes
from .base import ConvertedLayer, Preset


@cache
def preset_classes() -> dict[str, type[Preset]]:
    """All presets by name."""
    return {preset.name: preset for preset in defined_classes(__name__, __path__, Preset)}


__all__ = ["ConvertedLayer", "Preset", "preset_classes"]
