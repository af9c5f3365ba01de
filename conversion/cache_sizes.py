"""The cache that the user asks for."""

from dataclasses import dataclass, field

from .recovered import LEAST


@dataclass(kw_only=True)
class CacheSizes:
    """Give `cache_ratio`, or both `kv_lora_rank` and `qk_rope_head_dim`."""

    _argument_group_name = "size of the cache"

    cache_ratio: float | None = field(
        default=None,
        metadata={"help": "Size of the new cache over the old one, e.g. 0.3125, 0.1875, 0.125 (the paper's three)."},
    )
    kv_lora_rank: int | None = field(default=None, metadata={"help": "Latent size R per token and layer."})
    qk_rope_head_dim: int | None = field(
        default=None, metadata={"help": "Dims that keep RoPE in one rotary key; even."}
    )

    def __post_init__(self):
        if self.cache_ratio is None:
            return
        if self.kv_lora_rank is not None or self.qk_rope_head_dim is not None:
            raise ValueError("Give either cache_ratio, or kv_lora_rank and qk_rope_head_dim, not both.")
        if not 0 < self.cache_ratio < 1:  # so that NaN does not pass
            share = self.cache_ratio / 100 if LEAST <= self.cache_ratio < 100 else 0.3125
            raise ValueError(
                f"cache_ratio={self.cache_ratio} must lie between 0 and 1. For {100 * share:g} %, give {share:g}."
            )
