"""Show what each cache size would cost and bring, from the model's config alone: no weights are read.

    mha2mla plan meta-llama/Llama-3.1-8B
    mha2mla plan ./my-llama --gpu l40s
    mha2mla plan my-llama.Q4_K_M.gguf --memory 24

For the paper's three ratios and the sizes that kernels of inference engines are made for: bytes of cache, tokens in a
GPU's memory beside the weights, and the engines that take an export. What cannot be had is listed with the reason.
"""

import math
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mha2mla.common.kernel_sizes import ENGINES
from mha2mla.conversion.recovered import LOST, MODEL, SMALL, TOKENS, is_small

from .parsing import Positionals, parse

if TYPE_CHECKING:  # it imports torch
    from mha2mla.conversion.survey import Offer, Survey

POSITIONALS: Positionals = {"source": dict(help="Local folder, .gguf file, or name on the Hub.")}
# Of GPUs, in MiB, as nvidia-smi tells it.
GPU_MEMORY = {
    "h100": 81559,
    "h200": 143771,
    "a100": 81920,
    "a100-40gb": 40960,
    "b200": 183359,
    "l40s": 46068,
    "l4": 23034,
    "rtx-4090": 24564,
}
DEFAULT_GPU = "h100"
QUALITY = (
    f"Quality: {MODEL} lost, after recovery on {TOKENS}M tokens, over seven multiple-choice sets {LOST[31.25]} points "
    f"at 31.25 %, {LOST[18.75]} at 18.75 % and {LOST[12.5]} at 12.5 % (docs/dev/results.md). Yours is not "
    "measured: `mha2mla eval` does it."
)


@dataclass
class PlanArguments:
    """The model, and where it is to run."""

    gpu: str | None = field(
        default=None,
        metadata={
            "choices": tuple(GPU_MEMORY),
            "type": str.lower,
            "help": f"GPU that is to hold weights and cache, else {DEFAULT_GPU}; others by --memory.",
        },
    )
    memory: float | None = field(default=None, metadata={"help": "Memory of another GPU, in GiB."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})

    def __post_init__(self):
        if self.gpu is not None and self.memory is not None:
            raise ValueError("Give --gpu or --memory, not both.")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise ValueError(f"memory={self.memory:g} must be a number of GiB above 0.")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * 2**30) if self.memory is not None else GPU_MEMORY[self.gpu or DEFAULT_GPU] * 2**20

    @property
    def device(self) -> str:
        """For a person."""
        return f"{self.memory:g} GiB" if self.memory is not None else (self.gpu or DEFAULT_GPU).upper()


def main(argv: list[str]) -> None:
    options, given = parse(argv, "mha2mla plan", PlanArguments, description=__doc__, positionals=POSITIONALS)

    from mha2mla.conversion.cache_plan import served_dtype
    from mha2mla.conversion.source import source_config
    from mha2mla.conversion.survey import survey_caches

    config = source_config(given.source, options.revision)
    survey = survey_caches(config)
    served = served_dtype(config.dtype)
    print("\n\n".join(describe(given.source, survey, options, config.max_position_embeddings, served)))


def describe(source: str, survey: "Survey", options: PlanArguments, context: int, served: str) -> list[str]:
    """Paragraphs for a person, in the type of `served_dtype`."""
    from mha2mla.conversion.cache_plan import SERVED_BYTES
    from mha2mla.conversion.survey import MEMORY_SHARE
    from mha2mla.evaluation.report.table import Table

    original, offers = survey.original, survey.offers
    header = ["cache", "latent + rotary", "values", "share", f"bytes/token {served}", "fp8"]
    header += [f"GB at {context:,}", f"tokens in {options.device} {served}", "fp8"]

    def cells(offer: "Offer") -> list[str]:
        sizes = (SERVED_BYTES, 1)
        whole, fp8 = map(offer.bytes_per_token, sizes)
        fits = [f"{offer.tokens_in(options.memory_bytes, size):,}" for size in sizes]
        share = f"{100 * offer.width / original.width:.2f} %"
        gigabytes = f"{context * whole / 1e9:.2f}"
        return [offer.title, offer.sizes or "-", f"{offer.width:,}", share, f"{whole:,}", f"{fp8:,}", gigabytes, *fits]

    title = f"Cache of {source}: values per token and layer, and GB in {served} for a text of {context:,} tokens"
    table = Table(title, header, [cells(offer) for offer in (original, *offers)])
    heaviest = max(offer.weight_bytes for offer in (original, *offers))
    gigabytes = f"{original.weight_bytes / 1e9:.2f} GB; at most {heaviest / 1e9:.2f} GB converted"
    beside = (
        f"Tokens: {100 * MEMORY_SHARE:.0f} % of the memory less the weights in {served} ({gigabytes}), over the bytes "
        "of a token. Where kernels have the very size, the weights are an export's; a row that is padded to it caches "
        "the values that its line below says instead, and has more weights, too. fp8 caches are vLLM's; on Hopper "
        "vLLM 0.25.1 has none for 256 + 64."
    )
    titles_by_engines: dict[str, list[str]] = {}
    for offer in offers:
        titles_by_engines.setdefault(offer.engines, []).append(offer.title)
    lines = (f"  {', '.join(titles)}: {engines}" for engines, titles in titles_by_engines.items())
    engines = ["Engines that take an export:", *lines]
    small = ", ".join(offer.title for offer in offers if is_small(offer.width / original.width))
    refused = ["Not to be had:", *(f"  {title}: {reason}" for title, reason in survey.refused.items())]
    if heaviest > MEMORY_SHARE * options.memory_bytes:
        beside += " Where it says 0, the weights do not fit: give --memory, that of several GPUs together."
    parts = [table.markdown(), beside]
    if offers:
        command = shlex.join(["mha2mla", "convert", source, "CONVERTED", *advised(survey), "--data", "TEXT"])
        parts += ["\n".join(engines), QUALITY, *([f"{small}: {SMALL}."] if small else []), f"Next: {command}"]
    return [*parts, *(["\n".join(refused)] if survey.refused else [])]


def advised(survey: "Survey") -> tuple[str, ...]:
    """Options of `convert`: a size of vLLM's kernels, where it runs one that halves the cache; else the paper's."""
    kernels = [offer for offer in survey.offers if "--kv-lora-rank" in offer.options]  # --serve refuses a ratio
    served = [offer for offer in kernels if ENGINES["vllm"] in offer.takers]
    for offer in served:
        if 2 * offer.width <= survey.original.width:  # --serve alone takes the largest
            return ("--serve", "vllm") if offer is served[0] else (*offer.options, "--serve", "vllm")
    return survey.offers[0].options
