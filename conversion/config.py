"""What the user chooses, and the cache that follows from it."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig

from mha2mla.conversion.presets.paper import low_rank, rope_selection

from .source import head_dim

ROPE_SHARES = (0.2, 0.27, 0.34, 0.41)  # of a cache, for the rotary keys: tried by the preset `calibrated`


@dataclass
class ConversionConfig:
    """Options of a conversion. Sizes: give `cache_ratio`, or both `kv_lora_rank` and `qk_rope_head_dim`."""

    preset: Literal["calibrated", "paper"] = field(
        default="calibrated",
        metadata={"help": "How the MLA weights are made. calibrated: ours; paper: MHA2MLA, arXiv 2502.14837."},
    )
    cache_ratio: float | None = field(
        default=None,
        metadata={"help": "Size of the new cache over the old one, e.g. 0.3125, 0.1875, 0.125 (the paper's three)."},
    )
    kv_lora_rank: int | None = field(default=None, metadata={"help": "Latent size R per token and layer."})
    qk_rope_head_dim: int | None = field(
        default=None, metadata={"help": "Dims that keep RoPE in one rotary key; even."}
    )
    rope_layout: Literal["shared", "per-head"] = field(
        default="shared",
        metadata={"help": "calibrated: one rotary key for all heads, or one per key/value head (paper: always)."},
    )
    refine_steps: int = field(
        default=120, metadata={"help": "calibrated: gradient steps on each layer against the original's; 0: none."}
    )
    refine_batch_size: int = field(default=2, metadata={"help": "calibrated: blocks of text a refinement step."})
    refine_learning_rate: float = field(
        default=0.03, metadata={"help": "calibrated: relative to the root mean square of each matrix."}
    )
    score_samples: int = field(
        default=8, metadata={"help": "calibrated: blocks from which the cost of un-rotating is measured."}
    )
    calibration_state: str | None = field(
        default=None,
        metadata={"help": "calibrated: folder that keeps the statistics, to convert again at another size."},
    )
    rope_selection: Literal["2-norm", "uniform", "high", "low"] = field(
        default="2-norm", metadata={"help": "paper: which frequencies keep RoPE. 2-norm needs --calibration-data."}
    )
    svd: Literal["joint", "split", "none"] = field(
        default="joint",
        metadata={
            "help": "paper: low rank of keys and values together, apart with half the rank each, or not at all "
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
    calibration_samples: int = field(default=64, metadata={"help": "Blocks of calibration text."})
    calibration_length: int = field(default=512, metadata={"help": "Tokens of a block."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of calibration text."})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Type of the weights written; auto: the source's."}
    )
    device: str = field(default="cpu", metadata={"help": "Where calibration and decompositions run: cpu or cuda."})
    max_shard_size: str = field(default="2GB", metadata={"help": "Largest weights file; bounds the memory needed."})
    overwrite: bool = field(default=False, metadata={"help": "Replace OUTPUT if an earlier conversion made it."})

    def __post_init__(self):
        for name, allowed in (
            ("preset", ("calibrated", "paper")),
            ("rope_layout", ("shared", "per-head")),
            ("rope_selection", rope_selection.RULES),
            ("svd", low_rank.METHODS),
            ("dtype", ("auto", "bfloat16", "float16", "float32")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")
        for name, least in (
            ("calibration_samples", 1),
            ("calibration_length", 2),
            ("score_samples", 1),
            ("refine_steps", 0),
            ("refine_batch_size", 1),
            ("refine_learning_rate", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.needs_calibration and self.calibration_data is None:
            remedy = "give --calibration-data (a data set's name or a text file)"
            if self.preset == "calibrated":
                raise ValueError(f"The preset 'calibrated' measures the model on text: {remedy}.")
            raise ValueError(
                f"rope_selection='2-norm' measures queries and keys on text: {remedy}, or choose --rope-selection "
                "uniform, which needs none."
            )

    @property
    def needs_calibration(self) -> bool:
        return self.preset == "calibrated" or self.rope_selection == "2-norm"

    @property
    def shared_key(self) -> bool:
        """Whether all query heads share one rotary key."""
        return self.preset == "calibrated" and self.rope_layout == "shared"


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
    def rope_width(self) -> int:
        """Numbers per token and layer that rotary keys take, n*r."""
        return self.num_rope_key_heads * self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """Numbers that the converted model caches per token and layer, R + n*r."""
        return self.kv_lora_rank + self.rope_width

    @property
    def ratio(self) -> float:
        return self.width / self.source_width

    def describe(self, element_size: int) -> str:
        """One line for a person: what a token costs before and after, in bytes of `element_size` each."""
        before, after = (w * self.num_layers * element_size for w in (self.source_width, self.width))
        return (
            f"Cache: {self.source_width} -> {self.width} numbers per token and layer; {before:,} -> {after:,} bytes "
            f"per token ({100 * (self.ratio - 1):+.2f} %)"
        )


def plan_caches(options: ConversionConfig, source: PreTrainedConfig) -> list[CachePlan]:
    """
    The cache's sizes from the options, checked against the source: one plan, or several of one width of which the
    best is found by measurement (preset `calibrated` with `cache_ratio`).

    The preset `paper` splits a budget as its Table 1: d/8 rotary dims per key/value head, the rest for the latent.
    """
    dim, groups = head_dim(source), source.num_key_value_heads
    source_width = 2 * groups * dim
    rope_keys = 1 if options.shared_key else groups
    most_rope = groups * dim if options.shared_key else dim
    rope, rank = options.qk_rope_head_dim, options.kv_lora_rank

    def plan(rope: int, rank: int) -> CachePlan:
        return CachePlan(rank, rope, rope_keys, source_width, source.num_hidden_layers)

    if options.preset == "paper" and options.svd == "none":
        if rank is not None or options.cache_ratio is not None:
            raise ValueError("svd='none' does not compress: give --qk-rope-head-dim only; the latent follows from it.")
        rope = dim // 8 if rope is None else rope
        plans = [plan(rope, groups * (2 * dim - rope))]
    elif options.cache_ratio is not None:
        if rank is not None or rope is not None:
            raise ValueError("Give either cache_ratio, or kv_lora_rank and qk_rope_head_dim, not both.")
        if not 0 < options.cache_ratio < 1:
            raise ValueError(f"cache_ratio={options.cache_ratio} must lie between 0 and 1, e.g. 0.3125.")
        width = round(options.cache_ratio * source_width)
        ropes = [max(2, dim // 16 * 2)]
        if options.preset == "calibrated":
            shares = {round(share * width / rope_keys / 2) * 2 for share in ROPE_SHARES}
            ropes = sorted(rope for rope in shares if 2 <= rope <= most_rope) or [2]
        ranks = [width - rope_keys * rope for rope in ropes]
        if options.preset == "paper" and options.svd == "split":
            ranks = [rank - rank % 2 for rank in ranks]
        if min(ranks) < 1:
            raise ValueError(
                f"cache_ratio={options.cache_ratio} gives {width} numbers per token and layer, which {rope_keys} "
                f"rotary keys of {min(ropes)} dims use up. Use a ratio above "
                f"{rope_keys * min(ropes) / source_width:.4f}, or set --kv-lora-rank and --qk-rope-head-dim yourself."
            )
        plans = [plan(rope, rank) for rope, rank in zip(ropes, ranks, strict=True)]
    elif rank is None or rope is None:
        raise ValueError("Give --cache-ratio (e.g. 0.3125), or both --kv-lora-rank and --qk-rope-head-dim.")
    else:
        plans = [plan(rope, rank)]
    for candidate in plans:
        check_plan(candidate, options, source, most_rope)
    return plans


def check_plan(plan: CachePlan, options: ConversionConfig, source: PreTrainedConfig, most_rope: int) -> None:
    """Raise a `ValueError` if the source's matrices cannot fill the plan."""
    dim, groups = head_dim(source), source.num_key_value_heads
    rope, rank = plan.qk_rope_head_dim, plan.kv_lora_rank
    if rope % 2 != 0 or not 2 <= rope <= most_rope:
        where = "key/value heads x head_dim" if options.shared_key else "head_dim"
        raise ValueError(f"qk_rope_head_dim={rope} must be even and between 2 and the source's {where}, {most_rope}.")
    method = options.svd if options.preset == "paper" else "joint"
    if method == "split" and rank % 2 != 0:
        raise ValueError(f"kv_lora_rank={rank} must be even for svd='split': half goes to keys, half to values.")
    key_rows = groups * dim - plan.rope_width
    most = low_rank.max_rank(key_rows, groups * dim, source.hidden_size, method)
    if not 1 <= rank <= most:
        raise ValueError(
            f"kv_lora_rank={rank} must lie between 1 and {most}, the rank of the matrices it factorises. "
            "Lower --kv-lora-rank or --cache-ratio."
        )
