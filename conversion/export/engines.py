"""Inference engines that run DeepSeek checkpoints, and what each of them takes (docs/serving.md)."""

from collections.abc import Callable, Iterable, Sequence

from mha2mla.common.kernel_sizes import ENGINES, KERNEL_HEAD_DIM, KERNEL_ROPE_DIM, Engine
from mha2mla.common.loading import keys_values_width
from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.modeling.latent_config import LatentConfigMixin

from .experts import has_experts
from .plan import ExportPlan, check_architecture
from .rope_table import fit_table, frequency_places


def kernel_sizes(sizes: CacheSizes, engine: Engine, source_width: int) -> CacheSizes:
    """
    The sizes to convert to: those that are asked for, checked, or else the largest that the engine's kernels take and
    that is smaller than the source's cache.

    Args:
        source_width (`int`): Values that the source caches per token and layer.

    Raises:
        ValueError: If the engine has no kernels for what is asked for, not even with zeros put in.
    """
    if not engine.kernel_ranks:
        return sizes
    most, given = engine.kernel_ranks[0], (sizes.kv_lora_rank, sizes.qk_rope_head_dim)
    if sizes.cache_ratio is not None:
        raise ValueError(
            f"cache_ratio={sizes.cache_ratio} leaves the split open, and {engine.title} takes "
            f"{in_words(engine)} only. Leave --cache-ratio out, or give --kv-lora-rank and --qk-rope-head-dim."
        )
    if given == (None, None):
        for rank in engine.kernel_ranks:
            if rank + KERNEL_ROPE_DIM < source_width:
                return CacheSizes(kv_lora_rank=rank, qk_rope_head_dim=KERNEL_ROPE_DIM)
        raise ValueError(
            f"The source caches {source_width} values per token and layer, less than {engine.title} takes "
            f"({in_words(engine)}): there is nothing to gain there. To try it, give --kv-lora-rank and "
            "--qk-rope-head-dim, and export with --pad."
        )
    for name, value, limit in zip(("kv_lora_rank", "qk_rope_head_dim"), given, (most, KERNEL_ROPE_DIM), strict=True):
        if value is not None and value > limit:
            raise ValueError(
                f"{name}={value} is more than {engine.title} takes: {in_words(engine)}. Give {limit} or less."
            )
    return sizes


def check_servable(config: LatentConfigMixin, common_frequencies: bool, engine: Engine) -> None:
    """
    Raises:
        ValueError: If the engine cannot run an export of such a model, whatever its weights are.
    """
    try:
        check_architecture(config, "--preset calibrated --rope-layout shared")
    except ValueError as reason:
        raise ValueError(f"{reason} Without --serve it is converted, for use as it is.") from None
    if not common_frequencies:
        raise ValueError(
            f"Layers with frequencies of their own cannot be served by {engine.title}, whose rotary table is one for "
            "all. Leave --rope-frequencies per-layer out."
        )
    if engine.kernel_ranks and config.head_dim > KERNEL_HEAD_DIM:
        raise ValueError(
            f"head_dim={config.head_dim} is more than the {KERNEL_HEAD_DIM} that {engine.title} takes. Serve with "
            "transformers, which runs any size."
        )


def in_words(engine: Engine) -> str:
    """The sizes of its kernels: "512 + 64 or 256 + 64"."""
    return " or ".join(f"{rank} + {KERNEL_ROPE_DIM}" for rank in engine.kernel_ranks)


def padded_rank(engine: Engine, kv_lora_rank: int) -> int:
    """The latent that the engine's kernels give a model of this one."""
    return min(rank for rank in engine.kernel_ranks if rank >= kv_lora_rank)


def expressible_lists(config: LatentConfigMixin, engine: Engine) -> Callable[[Sequence[int]], bool]:
    """Whether a rotary table of the engine has all frequencies of a list, which are indices of the model's own."""
    places, theta = frequency_places(config), config.rope_parameters["rope_theta"]
    num_slots = KERNEL_ROPE_DIM // 2 if engine.kernel_ranks else None

    def expressible(frequencies: Sequence[int]) -> bool:
        return fit_table(places, list(frequencies), theta, engine.knows_step, num_slots) is not None

    return expressible


def advise_sizes(width: int, source_width: int) -> str | None:
    """For a person: the sizes that GPU kernels take, if they are smaller than the source's cache and not chosen."""
    ranks = ENGINES["vllm"].kernel_ranks
    smaller = [rank for rank in ranks if rank + KERNEL_ROPE_DIM < source_width]
    if not smaller or width in [rank + KERNEL_ROPE_DIM for rank in smaller]:
        return None
    shares = [f"{r} + {KERNEL_ROPE_DIM} ({(r + KERNEL_ROPE_DIM) / source_width:.1%} of the cache)" for r in smaller]
    too = [f", SGLang's {r} + {KERNEL_ROPE_DIM}" for r in ENGINES["sglang"].kernel_ranks if r in smaller]
    return f"vLLM's GPU kernels take {' or '.join(shares)}{''.join(too)}: --serve vllm chooses among them"


def engines_for(plan: ExportPlan, config: LatentConfigMixin) -> str:
    """For a person: which engines take an exported folder with these sizes."""
    if has_experts(config):  # transformers' DeepSeek does not renormalise a softmax router
        there = [engine for engine in ENGINES.values() if engine.kernel_ranks]
    else:
        there = [engine for name, engine in ENGINES.items() if name != "llama.cpp"]  # which takes a file
    heads = (plan.qk_nope_head_dim, plan.v_head_dim) == (KERNEL_HEAD_DIM, KERNEL_HEAD_DIM)
    kernels = heads and plan.qk_rope_head_dim == KERNEL_ROPE_DIM
    titles = [
        engine.title
        for engine in there
        if not engine.kernel_ranks or (kernels and plan.kv_lora_rank in engine.kernel_ranks)
    ]
    return ", ".join(titles) or "none, for which --pad is"


def fitting_engines(config: LatentConfigMixin, has_table: Callable[[Engine], bool]) -> list[tuple[Engine, int | None]]:
    """
    The engines that will run a stock export of a model with these sizes, each with the latent that the export must be
    padded to; None where it need not be.

    Args:
        has_table (`Callable`): Whether an engine has a rotary table of the model's frequencies.

    Raises:
        ValueError: If no engine can, whatever the sizes are.
    """
    check_architecture(config, "--rope-layout shared")
    small = config.head_dim <= KERNEL_HEAD_DIM and config.qk_rope_head_dim <= KERNEL_ROPE_DIM
    kernel_heads = (config.qk_rope_head_dim, config.head_dim) == (KERNEL_ROPE_DIM, KERNEL_HEAD_DIM)
    found: list[tuple[Engine, int | None]] = []
    for engine in ENGINES.values():
        fits = small and config.kv_lora_rank <= engine.kernel_ranks[0] if engine.kernel_ranks else True
        if not fits or (has_experts(config) and not engine.kernel_ranks) or not has_table(engine):
            continue
        rank = padded_rank(engine, config.kv_lora_rank) if engine.kernel_ranks else None
        found.append((engine, None if kernel_heads and rank == config.kv_lora_rank else rank))
    return found


def describe_engines(found: Iterable[tuple[Engine, int | None]], source_width: int) -> str:
    """For a person: what [`fitting_engines`] gives, and what of the source's cache a padded one takes."""

    def describe(engine: Engine, rank: int | None) -> str:
        if rank is None:
            return engine.title
        values = rank + KERNEL_ROPE_DIM
        return f"{engine.title} (--pad {rank}: {values} values, {values / source_width:.0%} of the original's)"

    return ", ".join(describe(*pair) for pair in found)


def engines_for_frequencies(
    config: LatentConfigMixin, frequencies: Sequence[int] | None, source_width: int
) -> tuple[list[tuple[Engine, int | None]], str]:
    """What [`fitting_engines`] gives for a model whose layers all rotate with these frequencies (None: each with its
    own), and for a person the same in words, or why there are none."""
    if frequencies is None:
        return [], "none. Layers have rotary frequencies of their own."
    try:
        found = fitting_engines(config, lambda engine: expressible_lists(config, engine)(frequencies))
    except ValueError as reason:
        return [], f"none. {reason}"
    return found, describe_engines(found, source_width) or "none. They have no rotary table of these frequencies."


def engines_by_padding(plan: ExportPlan, config: LatentConfigMixin) -> str:
    """For a person: the engines that `--pad` would open to an export without it; empty if there are none."""
    source_width = keys_values_width(config)
    found, _ = engines_for_frequencies(config, list(plan.table.slots), source_width)
    return describe_engines([pair for pair in found if pair[1] is not None], source_width)
