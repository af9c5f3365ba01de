"""What vLLM asks of a model's config: here the sizes are decided that it runs with."""

from dataclasses import asdict, replace
from typing import Any

from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from mha2mla.common.kernel_sizes import KERNEL_HEAD_DIM, KERNEL_RANKS, KERNEL_ROPE_DIM
from mha2mla.modeling import LatentConfigMixin, LatentShape


def kernel_shape(config: LatentConfigMixin, ranks: tuple[int, ...]) -> LatentShape:
    """
    The sizes of a checkpoint, filled up to those of kernels.

    Args:
        ranks (`tuple[int, ...]`): Latents that kernels take, ascending.

    Raises:
        ValueError: If the model does not fit.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The checkpoint's weights are quantised, and padding needs them as they were: serve the model from before "
            "that, and let vLLM quantise it (--quantization fp8)."
        )
    if config.num_rope_key_heads != 1:
        raise ValueError(
            f"num_rope_key_heads={config.num_rope_key_heads}: vLLM's latent attention has one rotary key for all "
            "heads; convert with the preset `calibrated`, or run the model in transformers."
        )
    most = dict(
        kv_lora_rank=ranks[-1],
        qk_rope_head_dim=KERNEL_ROPE_DIM,
        qk_nope_head_dim=KERNEL_HEAD_DIM,
        v_head_dim=KERNEL_HEAD_DIM,
    )
    for field, size in most.items():
        if getattr(config, field) > size:
            raise ValueError(
                f"{field}={getattr(config, field)} is more than the {size} of vLLM's kernels: convert with a smaller "
                "one, or run the model in transformers."
            )
    most["kv_lora_rank"] = next(rank for rank in ranks if rank >= config.kv_lora_rank)
    return replace(config.latent_shape, num_nope_key_heads=config.num_attention_heads, **most)


def use_kernel_sizes(config: Any, ranks: tuple[int, ...]) -> None:
    """Put [`kernel_shape`] into the config, from which vLLM's backends read sizes, and keep those of the checkpoint in
    `checkpoint_sizes`. A second time changes nothing."""
    if getattr(config, "checkpoint_sizes", None) is None:
        sizes, shape = asdict(config.latent_shape), kernel_shape(config, ranks)
        for field, size in asdict(shape).items():
            setattr(config, field, size)
        config.checkpoint_sizes = sizes


class LatentConfigConvertor(ModelArchConfigConvertorBase):
    """Tells vLLM that a model caches latents, and how wide its cache is."""

    def __init__(self, hf_config: Any, *args, **kwargs):
        # A smaller latent can be filled up to more than the next size of kernels, some of which vLLM has no fp8 cache
        # for: --hf-overrides '{"kernel_kv_lora_rank": 512}'.
        wanted = getattr(hf_config, "kernel_kv_lora_rank", None)
        ranks = KERNEL_RANKS[-1:] if current_platform.is_cpu() else KERNEL_RANKS
        use_kernel_sizes(hf_config, ranks if wanted is None else (wanted,))
        super().__init__(hf_config, *args, **kwargs)

    def is_deepseek_mla(self) -> bool:
        return True

    def get_head_size(self) -> int:
        return self.hf_text_config.latent_cache_dim
