"""Qwen2: Llama's block with biases on queries, keys and values, which are seen in the checkpoint."""

from .base import Architecture


class Qwen2(Architecture):
    model_type = "qwen2"
