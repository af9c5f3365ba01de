"""The result of an evaluation in a sentence: what a page opens with."""

import math
from pathlib import Path

from mha2mla.evaluation.results import ModelResult, Results

from .table import show
from .tables import (
    CHOICE_KINDS,
    average_accuracy,
    average_paired,
    compared_tasks,
    find_original_row,
    task_numbers,
    tasks_with,
)


def page_title(results: Results) -> str:
    """The model's name."""
    original = find_original_row(results)
    if original is None:
        return ", ".join(dict.fromkeys(model.name for model in results.models))
    return f"{Path(original.path).name}, converted to latent attention"


def results_in_words(results: Results) -> list[str]:
    """A sentence for every row that is not the original's; none without an original."""
    original = find_original_row(results)
    if original is None:
        return []
    rows = [model for model in results.models if model is not original]
    return [f"{model.label}: {', '.join(sentence(results, model, original))}." for model in rows]


def sentence(results: Results, model: ModelResult, original: ModelResult) -> list[str]:
    """Parts of one: cache, points, perplexity, as far as they were measured."""
    change = 100 * (1 - model.cache_bytes_per_token / original.cache_bytes_per_token)
    parts = [f"{abs(change):.2f} % {'less' if change >= 0 else 'more'} cache"]
    points = points_lost(results, model, original)
    if points is not None:
        lost, stderr = points
        parts.append(f"{show(abs(lost), stderr, digits=1, factor=100)} points {'lost' if lost >= 0 else 'gained'}")
    changes = {}
    for name in tasks_with(results, ("perplexity",), "perplexity"):
        before, after = (task_numbers(m, name).get("perplexity") for m in (original, model))
        if before and after and model.tasks[name]["digest"] == original.tasks[name]["digest"]:
            changes[name] = f"{100 * (after / before - 1):+.1f} %"
    if changes:
        parts.append("perplexity " + ", ".join(f"{text} ({name})" for name, text in changes.items()))
    return parts


def points_lost(results: Results, model: ModelResult, original: ModelResult) -> tuple[float, float] | None:
    """Accuracy that a model lost on average over the tasks, and its standard error: paired by items where these are
    known, or else as if they were different ones."""
    names = compared_tasks(results)
    difference = average_paired(model, original, names) if names else None
    if difference is not None:
        return -difference[0], difference[1]
    names = tasks_with(results, CHOICE_KINDS, "accuracy")
    before, after = (average_accuracy(m, names) for m in (original, model))
    if before is None or after is None:
        return None
    return before[0] - after[0], math.hypot(before[1], after[1])
