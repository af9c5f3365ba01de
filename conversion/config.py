"""What the user chooses, and the cache that follows from it."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig

from . import low_rank, rope_selection
from .source import head_dim


@dataclass
class ConversionConfig:
    """Options of a conversion. Sizes: give `cache_ratio`, or both `kv_lora_rank` and `qk_rope_head_dim`."""

    preset: Literal["paper"] = field(
        default="paper", metadata={"help": "How the MLA weights are made. paper: MHA2MLA, arXiv 2502.14837."}
    )
    cache_ratio: float | None = field(
        default=None,
        metadata={"help": "Size of the new cache over the old one, e.g. 0.3125, 0.1875, 0.125 (the paper's three)."},
    )
    kv_lora_rank: int | None = field(default=None, metadata={"help": "Latent size R per token and layer."})
    qk_rope_head_dim: int | None = field(
        default=None, metadata={"help": "Dims that keep RoPE in one rotary key; even."}
    )
    rope_selection: Literal["2-norm", "uniform", "high", "low"] = field(
        default="2-norm", metadata={"help": "Which frequencies keep RoPE. 2-norm needs --calibration-data."}
    )
    svd: Literal["joint", "split", "none"] = field(
        default="joint",
        metadata={
            "help": "Low rank of keys and values together, apart with half the rank each, or not at all "
            "(partial RoPE alone; the latent is then as large as keys and values)."
        },
    )
    calibration_data: str | None = field(
        default=None,
        metadata={"help": "Calibration text: a `datasets` name, or a .txt, .jsonl, .jsonl.gz or .parquet file."},
    )
    calibration_subset: str | None = field(default=None, metadata={"help": "Configuration of the data set, if any."})
    calibration_split: str = field(default="train", metadata={"help": "Split of a data set from the Hub."})
    calibration_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    calibration_samples: int = field(default=128, metadata={"help": "Blocks of calibration text."})
    calibration_length: int = field(default=1024, metadata={"help": "Tokens of a block."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of calibration text."})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Type of the weights written; auto: the source's."}
    )
    device: str = field(default="cpu", metadata={"help": "Where calibration and decompositions run: cpu or cuda."})
    max_shard_size: str = field(default="2GB", metadata={"help": "Largest weights file; bounds the memory needed."})
    overwrite: bool = field(default=False, metadata={"help": "Replace OUTPUT if an earlier conversion made it."})

    def __post_init__(self):
        for name, allowed in (
            ("preset", ("paper",)),
            ("rope_selection", rope_selection.RULES),
            ("svd", low_rank.METHODS),
            ("dtype", ("auto", "bfloat16", "float16", "float32")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")
        if self.calibration_samples < 1 or self.calibration_length < 2:
            raise ValueError(
                f"calibration_samples ({self.calibration_samples}) must be at least 1 and calibration_length "
                f"({self.calibration_length}) at least 2."
            )
        if self.needs_calibration and self.calibration_data is None:
            raise ValueError(
                "rope_selection='2-norm' measures queries and keys on text: give --calibration-data (a data set's "
                "name or a text file), or choose --rope-selection uniform, which needs none."
            )

    @property
    def needs_calibration(self) -> bool:
        return self.rope_selection == "2-norm"


@dataclass(frozen=True)
class CachePlan:
    """
    The cache of the converted model beside that of its source.

    Attributes:
        kv_lora_rank (`int`): Latent size R.
        qk_rope_head_dim (`int`): Dims r of one rotary key.
        num_rope_key_heads (`int`): Rotary keys per token, n.
        source_width (`int`): Numbers that the source caches per token and layer, 2 * G * d.
        num_layers (`int`): Layers.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    num_rope_key_heads: int
    source_width: int
    num_layers: int

    @property
    def width(self) -> int:
        """Numbers that the converted model caches per token and layer, R + n*r."""
        return self.kv_lora_rank + self.num_rope_key_heads * self.qk_rope_head_dim

    @property
    def ratio(self) -> float:
        return self.width / self.source_width

    def describe(self, element_size: int) -> str:
        """One line for a person: what a token costs before and after, in bytes of `element_size` each."""
        before, after = (w * self.num_layers * element_size for w in (self.source_width, self.width))
        rope = f"{self.num_rope_key_heads} x {self.qk_rope_head_dim}"
        return (
            f"Cache: {self.source_width} -> {self.width} numbers per token and layer (latent {self.kv_lora_rank} + "
            f"rotary {rope}); {before:,} -> {after:,} bytes per token ({100 * (self.ratio - 1):+.2f} %)"
        )


def plan_cache(options: ConversionConfig, source: PreTrainedConfig) -> CachePlan:
    """
    Sizes from the options, checked against the source.

    From `cache_ratio` alone the paper's split follows (its Table 1): d/8 rotary dims per key/value head, the rest of
    the budget for the latent.
    """
    dim, groups = head_dim(source), source.num_key_value_heads
    source_width = 2 * groups * dim
    rope, rank = options.qk_rope_head_dim, options.kv_lora_rank
    if options.svd == "none":
        if rank is not None or options.cache_ratio is not None:
            raise ValueError("svd='none' does not compress: give --qk-rope-head-dim only; the latent follows from it.")
        rope = dim // 8 if rope is None else rope
        rank = groups * (2 * dim - rope)
    elif options.cache_ratio is not None:
        if rank is not None or rope is not None:
            raise ValueError("Give either cache_ratio, or kv_lora_rank and qk_rope_head_dim, not both.")
        if not 0 < options.cache_ratio < 1:
            raise ValueError(f"cache_ratio={options.cache_ratio} must lie between 0 and 1, e.g. 0.3125.")
        rope = max(2, dim // 8 // 2 * 2)
        rank = round(options.cache_ratio * source_width) - groups * rope
        if options.svd == "split":
            rank -= rank % 2
        if rank < 1:
            raise ValueError(
                f"cache_ratio={options.cache_ratio} gives {round(options.cache_ratio * source_width)} numbers per "
                f"token and layer, which {groups} rotary keys of {rope} dims use up. Use a ratio above "
                f"{groups * rope / source_width:.4f}, or set --kv-lora-rank and --qk-rope-head-dim yourself."
            )
    elif rank is None or rope is None:
        raise ValueError("Give --cache-ratio (e.g. 0.3125), or both --kv-lora-rank and --qk-rope-head-dim.")
    if rope % 2 != 0 or not 2 <= rope <= dim:
        raise ValueError(f"qk_rope_head_dim={rope} must be even and between 2 and the source's head_dim {dim}.")
    if options.svd == "split" and rank % 2 != 0:
        raise ValueError(f"kv_lora_rank={rank} must be even for svd='split': half goes to keys, half to values.")
    most = low_rank.max_rank(groups * (dim - rope), groups * dim, source.hidden_size, options.svd)
    if not 1 <= rank <= most:
        raise ValueError(
            f"kv_lora_rank={rank} must lie between 1 and {most}, the rank of the matrices it factorises. "
            "Lower --kv-lora-rank or --cache-ratio."
        )
    return CachePlan(rank, rope, groups, source_width, source.num_hidden_layers)
