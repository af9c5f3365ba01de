"""Conversion of Llama-type checkpoints to Multi-head Latent Attention."""

from .config import CachePlan, ConversionConfig, plan_caches
from .convert import convert

__all__ = ["CachePlan", "ConversionConfig", "convert", "plan_caches"]
