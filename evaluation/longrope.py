"""Longrope turns keys by one table in short texts and by another in long ones, and the largest position chooses.

What a text left in a cache before it outgrew the first table is of no use behind that: `generate` reads the text
again, and nothing here may read it in several passes over one cache.
"""

import math

from transformers import PreTrainedConfig

from .caches import CacheKind


def first_table(config: PreTrainedConfig) -> float:
    """Tokens up to which a model's first rotary table holds: infinitely many if it has no other."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf


def crosses(config: PreTrainedConfig, read: int, length: int) -> bool:
    """Whether a text outgrows the first table between its first pass, of `read` tokens, and its end."""
    return read <= first_table(config) < length


def tables_mixed(what: str, config: PreTrainedConfig, length: int, kind: CacheKind, remedy: str) -> ValueError:
    """For a person: why a text is not read through a quantised cache."""
    return ValueError(
        f"{what} is read up to {length} tokens, in pieces through the cache {kind.name}, and longrope's first table "
        f"ends at {first_table(config)}: the cache would hold keys of both tables, which the model never reads. "
        f"{remedy}, or leave {kind.name} out (--caches dynamic)."
    )
