"""Conversion of Llama-type checkpoints to Multi-head Latent Attention."""

from .config import CachePlan, ConversionConfig, plan_cache
from .convert import convert

__all__ = ["CachePlan", "ConversionConfig", "convert", "plan_cache"]
