"""Conversion of pretrained checkpoints to Multi-head Latent Attention."""

from .cache_plan import CachePlan
from .config import ConversionConfig
from .convert import convert
from .presets.calibrated import Calibrated
from .presets.paper import Paper

__all__ = ["CachePlan", "Calibrated", "ConversionConfig", "Paper", "convert"]
