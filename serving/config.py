"""What vLLM asks of a model's config before it builds the model."""

from typing import Any

from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from mha2mla.common.kernel_sizes import KERNEL_RANKS

from .sizes import use_kernel_sizes, wanted_ranks


class LatentConfigConvertor(ModelArchConfigConvertorBase):
    """Tells vLLM that a model caches latents, and how wide its cache is. `kernel_kv_lora_rank` in the config (by
    `--hf-overrides`) asks for a latent of that size where a smaller one would do."""

    def __init__(self, hf_config: Any, *args, **kwargs):
        ranks = KERNEL_RANKS[-1:] if current_platform.is_cpu() else KERNEL_RANKS
        use_kernel_sizes(hf_config, wanted_ranks(hf_config, ranks))
        super().__init__(hf_config, *args, **kwargs)

    def is_deepseek_mla(self) -> bool:
        return True

    def get_head_size(self) -> int:
        return self.hf_text_config.latent_cache_dim
