"""What a conversion ends with: what it did to the cache and to the model, and the commands that come next."""

import shlex
from pathlib import Path

from mha2mla.common.extras import EXAMPLES, installing
from mha2mla.common.kernel_sizes import ENGINES, KERNEL_ROPE_DIM, Engine, filled_up_sizes, longest_text
from mha2mla.common.perplexity import perplexity_of
from mha2mla.modeling.latent_config import LatentConfigMixin

from .cache_plan import CachePlan
from .config import ConversionConfig
from .export.engines import engines_for_frequencies
from .recovered import expectation

RECIPE = "docs/examples/recovery.yaml"
RECIPE_ROWS = 8192, 2  # its length and gradient_accumulation_steps
PLUGIN = f"  # after {installing('vllm')}"


def summary(
    original: str | None,
    output: Path,
    options: ConversionConfig,
    plan: CachePlan,
    config: LatentConfigMixin,
    losses: dict[str, float],
    served: str,
) -> str:
    """
    For a person.

    Args:
        original (`str`, *optional*): The source, where transformers loads it by its name: no GGUF file.
        config (`LatentConfigMixin`): Of the converted model.
        losses (`dict[str, float]`): Of the "source" and of the "converted" model, see [`ConversionJob`]; empty where
            they were not measured.
        served (`str`): The type that bytes are counted in, see [`served_dtype`].
    """
    lines = [plan.describe(served)]
    if losses:
        before, after = losses["source"], losses["converted"]
        lines.append(
            f"Loss: {before:.3f} -> {after:.3f} nats per token (perplexity {perplexity_of(before):,.1f} -> "
            f"{perplexity_of(after):,.1f}) on held-out text of the same data"
        )
    found, engines = engines_for_frequencies(config, plan.frequencies, plan.source_width)
    lines.append(f"Engines for an export: {engines}")
    if options.data is not None:
        lines.append(f"Recovery: {expectation(plan.ratio)}")
    context = config.max_position_embeddings
    commands = [*compare_and_recover(original, output, options, context), *serve(output, found, plan, config)]
    return "\n".join([*lines, f"Wrote {output}", "Next:", *(f"  {command}" for command in commands)])


def compare_and_recover(original: str | None, output: Path, options: ConversionConfig, context: int) -> list[str]:
    """Commands that show the model beside its source, and that train it back to it."""
    commands = [] if original is None else [shlex.join(["mha2mla", "chat", original, str(output)])]
    if options.data is not None:
        named = {"--teacher": original, "--data": options.data, "--column": options.column, "--subset": options.subset}
        named["--split"] = None if options.split == "train" else options.split
        given = [word for name, value in named.items() if value is not None for word in (name, value)]
        if options.device == "cpu":  # to see that it works
            how = f"--use_cpu --length {min(256, context)} --per_device_train_batch_size 2 --max_steps 10".split()
            how += ["--learning_rate", "3e-5", *(["--distillation_weight", "1"] if original is not None else [])]
        else:  # the recipe is for a teacher
            how = ["--config", RECIPE] if original is not None else ["--bf16"]
            length, steps = RECIPE_ROWS
            if original is not None and context < length:  # as many tokens a step
                how += ["--length", str(context), "--gradient_accumulation_steps", str(steps * length // context)]
        named_output = ["--output", f"{output}-recovered"]
        where = "" if RECIPE not in how or Path(RECIPE).is_file() else f"  # its recipe: {EXAMPLES}"
        command = ["mha2mla", "train", *how, "--model", str(output), *given, *named_output]
        commands.append(shlex.join(command) + where)
    return commands


def serve(
    output: Path, found: list[tuple[Engine, int | None]], plan: CachePlan, config: LatentConfigMixin
) -> list[str]:
    """Commands that export and serve the model: padded for vLLM, where that is at most half of the source's cache."""
    if not found:
        return serve_as_it_is(output, config)
    served = f"{output}-served"
    export, vllm = ["mha2mla", "export", str(output), served], ENGINES["vllm"]
    rank = dict(found).get(vllm)
    if vllm not in dict(found) or (rank is not None and 2 * (rank + KERNEL_ROPE_DIM) > plan.source_width):
        return [shlex.join(export)]
    padding = [] if rank is None else ["--pad", str(rank)]
    return [shlex.join([*export, *padding]), shlex.join(["vllm", "serve", served])]


def serve_as_it_is(output: Path, config: LatentConfigMixin) -> list[str]:
    """The command that serves the model by the vLLM plugin, if that takes it."""
    try:
        filled_up_sizes(config)
    except ValueError:
        return []
    limit = longest_text(config)
    options = [] if limit is None else ["--max-model-len", str(limit)]
    return [f"{shlex.join(['vllm', 'serve', str(output), *options])}{PLUGIN}"]
