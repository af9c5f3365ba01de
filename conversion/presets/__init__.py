"""Ways to make MLA weights: one folder a preset, found by itself."""

from functools import cache

from mha2mla.common.discovery import defined_classes

from .base import ConvertedLayer, Preset


@cache
def preset_classes() -> dict[str, type[Preset]]:
    """All presets by name."""
    found = defined_classes(__name__, __path__, Preset)  # type: ignore[type-abstract]
    return {preset.name: preset for preset in found}


__all__ = ["ConvertedLayer", "Preset", "preset_classes"]
