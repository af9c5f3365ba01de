"""The cache of the converted model: what the user asks for, and what the source's matrices can fill."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from mha2mla.common.loading import keys_values_width

from .cache_sizes import CacheSizes
from .rotary import every_layer_has_rope, head_dim, num_rotary_pairs

SERVED_BYTES = 2  # of a value in weights and cache


def served_dtype(stored: object) -> str:
    """For a person: the type of [`SERVED_BYTES`] that a model is served in, whose weights are stored in this one."""
    return "fp16" if str(stored).removeprefix("torch.") == "float16" else "bf16"


def runs(frequencies: tuple[int, ...]) -> str:
    """A list for a person: "0-15, 22-25"."""
    starts = [i for i, f in enumerate(frequencies) if i == 0 or f != frequencies[i - 1] + 1]
    ends = [*(i - 1 for i in starts[1:]), len(frequencies) - 1]
    pairs = ((frequencies[a], frequencies[b]) for a, b in zip(starts, ends, strict=True))
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


@dataclass(frozen=True)
class CachePlan:
    """
    The cache of the converted model beside that of its source.

    Attributes:
        kv_lora_rank (`int`): Latent size R.
        qk_rope_head_dim (`int`): Dims r of one rotary key.
        num_rope_key_heads (`int`): Rotary keys per token, n.
        source_width (`int`): Values that the source caches per token and layer, 2 * G * d.
        num_layers (`int`): Layers.
        frequencies (`tuple[int, ...]`, *optional*): What all layers rotate with, indices of the source's frequencies;
            none if each layer has its own.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    num_rope_key_heads: int
    source_width: int
    num_layers: int
    frequencies: tuple[int, ...] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether frequencies, if all layers share them, are the highest of the source: the table of every engine."""
        return self.frequencies in (None, tuple(range(self.qk_rope_head_dim // 2)))

    @property
    def rope_width(self) -> int:
        """Values per token and layer that rotary keys take, n*r."""
        return self.num_rope_key_heads * self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """Values that the converted model caches per token and layer, R + n*r."""
        return self.kv_lora_rank + self.rope_width

    @property
    def ratio(self) -> float:
        return self.width / self.source_width

    def __str__(self) -> str:
        sizes = f"rotary {self.num_rope_key_heads} x {self.qk_rope_head_dim} + latent {self.kv_lora_rank}"
        return sizes if self.frequencies is None else f"{sizes}, frequencies {runs(self.frequencies)}"

    def describe(self, served: str) -> str:
        """One line for a person: what a token costs before and after, in the type of [`served_dtype`]."""
        before, after = (w * self.num_layers * SERVED_BYTES for w in (self.source_width, self.width))
        return (
            f"Cache: {self.source_width} -> {self.width} values per token and layer; {before:,} -> {after:,} bytes "
            f"per token in {served} ({100 * (self.ratio - 1):+.2f} %)"
        )


def unrotated_rows(source: PreTrainedConfig, rope_width: int) -> int:
    """Rows of un-rotated keys, beside rotary keys of `rope_width` dims: in a layer without RoPE all of them."""
    rows = source.num_key_value_heads * head_dim(source)
    return rows - rope_width if every_layer_has_rope(source) else rows


def plan_cache(
    sizes: CacheSizes,
    source: PreTrainedConfig,
    num_rope_key_heads: int,
    rope_dims: Callable[[int], int],
    ranks: Callable[[int, int, int], range],
) -> CachePlan:
    """
    The plan of the size that is asked for, checked against the source.

    Args:
        sizes (`CacheSizes`): What the user asks for.
        source (`PreTrainedConfig`): The source's config.
        num_rope_key_heads (`int`): Rotary keys per token, n.
        rope_dims (`Callable`): Dims of a rotary key in a cache of so many values per token and layer.
        ranks (`Callable`): Sizes that the latent may have, given the rows of un-rotated keys, the rows of values, and
            the hidden size.

    Raises:
        ValueError: If a size is missing, or more than the source's matrices can fill.
    """
    source_width = keys_values_width(source)
    value_rows = source_width // 2

    def ranks_beside(rope: int) -> range:
        return ranks(unrotated_rows(source, num_rope_key_heads * rope), value_rows, source.hidden_size)

    ratio, rope, rank = sizes.cache_ratio, sizes.qk_rope_head_dim, sizes.kv_lora_rank
    if ratio is None:
        if rank is None or rope is None:
            raise ValueError("Give --cache-ratio (e.g. 0.3125), or both --kv-lora-rank and --qk-rope-head-dim.")
    else:
        width = round(ratio * source_width)
        rope = rope_dims(width)
        rank = width - num_rope_key_heads * rope
        rank -= rank % ranks_beside(rope).step
        if rank < 1:
            raise ValueError(
                f"cache_ratio={ratio} gives {width} values per token and layer, which {num_rope_key_heads} rotary "
                f"keys of {rope} dims use up. Use a ratio above {num_rope_key_heads * rope / source_width:.4f}, or "
                "set --kv-lora-rank and --qk-rope-head-dim yourself."
            )
    plan = CachePlan(rank, rope, num_rope_key_heads, source_width, source.num_hidden_layers)
    check_plan(plan, ranks_beside(rope), source)
    return plan


def check_plan(plan: CachePlan, ranks: range, source: PreTrainedConfig) -> None:
    """Raise a `ValueError` if the source's matrices cannot fill the plan."""
    rope, rank = plan.qk_rope_head_dim, plan.kv_lora_rank
    most = 2 * num_rotary_pairs(source) * source.num_key_value_heads // plan.num_rope_key_heads
    if rope % 2 != 0 or not 2 <= rope <= most:
        where = "key/value heads x rotary dims" if plan.num_rope_key_heads == 1 else "rotary dims of a head"
        raise ValueError(f"qk_rope_head_dim={rope} must be even and between 2 and the source's {where}, {most}.")
    if rank not in ranks:
        steps = "" if ranks.step == 1 else f" in steps of {ranks.step}"
        raise ValueError(
            f"kv_lora_rank={rank} must lie between {ranks.start} and {ranks.stop - 1}{steps}, the rank of the "
            "matrices it factorises. Lower --kv-lora-rank or --cache-ratio."
        )
