"""Inference engines, and the sizes of latent attention that their kernels are made for (measured or read:
docs/dev/serving.md)."""

from dataclasses import dataclass
from typing import Any

KERNEL_ROPE_DIM = 64
KERNEL_HEAD_DIM = 128  # of un-rotated keys, and of values


@dataclass(frozen=True)
class Engine:
    """
    Attributes:
        title (`str`): For a person.
        kernel_ranks (`tuple[int, ...]`): Latents that its kernels are made for, with 64 rotary dims and heads of at
            most 128, the largest first; empty if it takes any size.
        knows_step (`bool`): Whether it has yarn's step, see [`RopeTable`].
    """

    title: str
    kernel_ranks: tuple[int, ...] = ()
    knows_step: bool = True


ENGINES = {
    "transformers": Engine("transformers"),
    "vllm": Engine("vLLM on a GPU", (512, 256)),
    "vllm-cpu": Engine("vLLM on a CPU", (512,)),
    "sglang": Engine("SGLang", (512,)),
    "llama.cpp": Engine("llama.cpp", knows_step=False),
}
KERNEL_RANKS = ENGINES["vllm"].kernel_ranks[::-1]  # ascending


def filled_up_sizes(config: Any, ranks: tuple[int, ...] = KERNEL_RANKS) -> dict[str, int]:
    """
    The sizes that a model of ours has in our vLLM plugin, which fills it up with zeros to those of kernels.

    Args:
        config (`LatentConfigMixin`): Of the checkpoint.
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
    return sizes


def longest_text(config: Any) -> int | None:
    """Tokens up to which rotary frequencies are what they are at first; None if they never change."""
    rope = config.rope_parameters
    limits = dict(dynamic=config.max_position_embeddings, longrope=rope.get("original_max_position_embeddings"))
    return limits.get(rope["rope_type"])
