"""The preset `calibrated`: closed form from statistics of text, then layer-local refinement."""

from .preset import Calibrated

__all__ = ["Calibrated"]
