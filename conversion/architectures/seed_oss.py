"""Seed-OSS: Llama's block with biases on queries, keys and values, which are seen in the checkpoint."""

from .base import Architecture


class SeedOss(Architecture):
    model_type = "seed_oss"
