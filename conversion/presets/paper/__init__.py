"""The preset `paper`: MHA2MLA, arXiv 2502.14837."""

from .preset import Paper

__all__ = ["Paper"]
