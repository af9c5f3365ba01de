"""What conversion cost and what it bought."""

from .perplexity import Perplexity, measure_perplexity

__all__ = ["Perplexity", "measure_perplexity"]
