"""The result of an evaluation in a sentence: what a page opens with."""

import math
from pathlib import Path

from mha2mla.evaluation.caches import DYNAMIC
from mha2mla.evaluation.results import ModelResult, Results
from mha2mla.evaluation.windows import GREEDY, REMEDIES

from .table import show
from .tables import (
    CHOICE_KINDS,
    average_accuracy,
    average_paired,
    compared_tasks,
    find_original_row,
    short_dtype,
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
    """A sentence for every row that is not the original's, none without an original; and what rows do not tell."""
    original = find_original_row(results)
    if original is None:
        return unread(results)
    rows = [model for model in results.models if model is not original]
    return [f"{m.label}: {', '.join(sentence(results, m, original))}." for m in rows] + unread(results)


def unread(results: Results) -> list[str]:
    """A sentence for every figure of a quantised cache that its items, or some of them, did not read."""
    sentences = []
    for model in results.models:
        for name, task in model.tasks.items():
            numbers, row = task["numbers"], f"{model.label}, {name}"
            if "num_read" not in numbers:  # the cache has no window
                continue
            read, given = numbers["num_read"], numbers["num_given"]
            exact = f"{numbers['exact_tokens']} tokens, up to which this cache is in full precision"
            if read == 0:
                sentences.append(f"{row}: not measured. No item has more than {exact}: give {REMEDIES[task['kind']]}.")
                continue
            if read < given:
                sentences.append(
                    f"{row}: {read} of {given} items read rounded entries. The others have at most {exact}."
                )
            if task["kind"] == "agreement" and GREEDY[0] not in numbers:
                sentences.append(
                    f"{row}: greedy tokens not measured. There are at most {exact}: give more --new-tokens."
                )
    return sentences


def sentence(results: Results, model: ModelResult, original: ModelResult) -> list[str]:
    """Parts of one: cache, points, perplexity, as far as they were measured."""
    change = 100 * (1 - model.cache_bytes_per_token / original.cache_bytes_per_token)
    # Bytes are those of the types that both ran in.
    of_original = short_dtype(original) if original.cache == DYNAMIC.name else original.cache
    parts = [f"{abs(change):.2f} % {'less' if change >= 0 else 'more'} cache than the original's {of_original}"]
    points = points_lost(results, model, original)
    if points is not None:
        lost, stderr = points
        told = f"{show(abs(lost), stderr, digits=1, factor=100)} points {'lost' if lost >= 0 else 'gained'}"
        counts = [task_numbers(model, name) for name in tasks_with(results, CHOICE_KINDS, "accuracy")]
        read, given = (sum(numbers.get(key, 0) for numbers in counts) for key in ("num_read", "num_given"))
        parts.append(told if read == given else f"{told} ({read} of {given} items read rounded entries)")
    elif tasks_with(results, CHOICE_KINDS, "accuracy"):
        parts.append("points lost not measured")
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
