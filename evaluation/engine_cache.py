"""Caches that hold what an engine's fp8 cache would give back, to tell what that costs before anything is served.

vLLM's `--kv-cache-dtype fp8` rounds what it caches to e4m3 with a scale of 1: keys and values of a stock model,
latents and rotary keys of a converted one. These caches round likewise as they are written, the newest token too, and
hold the numbers in the model's own type. Queries are not rounded, which kernels for Hopper do: vLLM 0.25.1 lost 1.5 %
of two models' perplexity where this tells 0.9 and 1.1 (docs/dev/performance.md).
"""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig

from mha2mla.modeling import LatentConfigMixin
from mha2mla.modeling.latent_cache import LatentDynamicLayer
from mha2mla.modeling.latent_quantization import round_fp8


class RoundedKeysValues(DynamicCache):
    """Keys and values, rounded."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(round_fp8(key_states), round_fp8(value_states), *args, **kwargs)


class RoundedLatents(LatentDynamicLayer):
    """Latents and rotary keys, rounded."""

    _layer_type = None  # or transformers would take it for the layer of every latent cache

    def append(self, entries: torch.Tensor) -> None:
        super().append(round_fp8(entries))


def engine_fp8_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache of a model."""
    if isinstance(config, LatentConfigMixin):
        return Cache(layers=[RoundedLatents() for _ in range(config.num_hidden_layers)])
    return RoundedKeysValues(config=config)


def engine_fp8_nbytes(cache_nbytes: float, cache: Cache) -> float:
    """Bytes in the engine, one a number, of a cache that takes `cache_nbytes` here."""
    return cache_nbytes / cache.layers[0].keys.element_size()
