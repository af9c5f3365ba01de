"""Llama, whose names and parts are those of the base class."""

from .base import Architecture


class Llama(Architecture):
    model_type = "llama"
