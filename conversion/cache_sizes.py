"""The cache that the user asks for."""

from dataclasses import dataclass, field


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
