"""Sizes that a checkpoint is served with: its own, filled up to those of kernels."""

from dataclasses import asdict, replace
from typing import Any

from mha2mla.common.kernel_sizes import filled_up_sizes
from mha2mla.modeling import LatentConfigMixin, LatentShape


def kernel_shape(config: LatentConfigMixin, ranks: tuple[int, ...]) -> LatentShape:
    """
    The sizes of a checkpoint, filled up to those of kernels; an un-rotated key for each query head.

    Args:
        ranks (`tuple[int, ...]`): Latents that kernels take, ascending.

    Raises:
        ValueError: If the model does not fit.
    """
    return replace(
        config.latent_shape, num_nope_key_heads=config.num_attention_heads, **filled_up_sizes(config, ranks)
    )


def wanted_ranks(config: Any, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Of the latents that an engine's kernels take, those that the config allows: the one of `kernel_kv_lora_rank`, if
    it has that. A `ValueError` if it is none of them."""
    wanted = getattr(config, "kernel_kv_lora_rank", None)
    found = tuple(rank for rank in ranks if wanted in (None, rank))
    if not found:
        raise ValueError(f"kernel_kv_lora_rank={wanted!r} must be one of {', '.join(map(str, ranks))} here.")
    return found


def use_kernel_sizes(config: Any, ranks: tuple[int, ...]) -> None:
    """Put [`kernel_shape`] into the config, from which vLLM's backends read sizes, and keep the checkpoint's own in
    `checkpoint_sizes`. A second time changes nothing."""
    if getattr(config, "checkpoint_sizes", None) is None:
        sizes = asdict(config.latent_shape)
        for field, size in asdict(kernel_shape(config, ranks)).items():
            setattr(config, field, size)
        config.checkpoint_sizes = sizes
