"""Mistral: Llama's block; its sliding window, where it has one, is refused."""

from .base import Architecture


class Mistral(Architecture):
    model_type = "mistral"
