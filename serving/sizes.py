"""Sizes that a checkpoint is served with: its own, filled up to those of kernels."""

from dataclasses import asdict, replace
from typing import Any

from mha2mla.common.kernel_sizes import KERNEL_HEAD_DIM, KERNEL_ROPE_DIM
from mha2mla.modeling import LatentConfigMixin, LatentShape


def kernel_shape(config: LatentConfigMixin, ranks: tuple[int, ...]) -> LatentShape:
    """
    The sizes of a checkpoint, filled up to those of kernels; an un-rotated key for each query head.

    Args:
        ranks (`tuple[int, ...]`): Latents that kernels take, ascending.

    Raises:
        ValueError: If the model does not fit.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The checkpoint's weights are quantised, and padding needs them as they were: serve the model from before "
            "that."
        )
    if not getattr(config, "gated_mlp", True):
        raise ValueError(
            "gated_mlp=False: vLLM's Llama has a gated MLP, and the model's (Arcee's) is none; run it in transformers."
        )
    if config.num_rope_key_heads != 1:
        raise ValueError(
            f"num_rope_key_heads={config.num_rope_key_heads}: vLLM's latent attention has one rotary key for all "
            "heads; convert with the preset `calibrated`, or run the model in transformers."
        )
    sizes = dict(
        kv_lora_rank=next((rank for rank in ranks if rank >= config.kv_lora_rank), ranks[-1]),
        qk_rope_head_dim=KERNEL_ROPE_DIM,
        qk_nope_head_dim=KERNEL_HEAD_DIM,
        v_head_dim=KERNEL_HEAD_DIM,
    )
    for field, size in sizes.items():
        if getattr(config, field) > size:
            raise ValueError(
                f"{field}={getattr(config, field)} is more than the {size} of vLLM's kernels: convert with a smaller "
                "one, or run the model in transformers."
            )
    return replace(config.latent_shape, num_nope_key_heads=config.num_attention_heads, **sizes)


def use_kernel_sizes(config: Any, ranks: tuple[int, ...]) -> None:
    """Put [`kernel_shape`] into the config, from which vLLM's backends read sizes, and keep the checkpoint's own in
    `checkpoint_sizes`. A second time changes nothing."""
    if getattr(config, "checkpoint_sizes", None) is None:
        sizes = asdict(config.latent_shape)
        for field, size in asdict(kernel_shape(config, ranks)).items():
            setattr(config, field, size)
        config.checkpoint_sizes = sizes
