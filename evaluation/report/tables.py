"""Tables of an evaluation: models below one another, what was measured beside one another."""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from mha2mla.evaluation.measures.multiple_choice import paired_difference
from mha2mla.evaluation.results import ORIGINAL, ModelResult, Results

from .table import Table, show

CHOICE_KINDS = ("choice", "harness")
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # as everywhere where bytes are told

Numbers = dict[str, Any]


def task_numbers(model: ModelResult, name: str) -> Numbers:
    """Of a task, empty where it was not measured."""
    return model.tasks[name]["numbers"] if name in model.tasks else {}


def tasks_with(results: Results, kinds: Sequence[str], key: str) -> list[str]:
    """Names of the tasks of these kinds of which some model has the number `key`, in the order of measurement."""
    return list(
        dict.fromkeys(
            name
            for model in results.models
            for name, task in model.tasks.items()
            if task["kind"] in kinds and key in task["numbers"]
        )
    )


def model_cells(results: Results, model: ModelResult) -> list[str]:
    """Name, cache per token, and how much smaller it is than the original's. Bytes are those of the type that a model
    ran in, so it is named: in the header, or with each number where rows have several."""
    original = find_original_row(results)
    if original is None or model is original:
        change = "-"
    else:
        change = f"{100 * (model.cache_bytes_per_token / original.cache_bytes_per_token - 1):+.2f} %"
    size = show(model.cache_bytes_per_token, digits=0)
    return [model.label, size if one_dtype(results) else f"{size} {short_dtype(model)}", change]


def short_dtype(model: ModelResult) -> str:
    return SHORT_DTYPES.get(model.dtype, model.dtype)


def one_dtype(results: Results) -> str | None:
    """The type that all rows were measured in; None where they differ."""
    dtypes = {short_dtype(model) for model in results.models}
    return dtypes.pop() if len(dtypes) == 1 else None


def make_table(results: Results, title: str, columns: dict[str, Callable[[ModelResult], str]]) -> Table:
    rows = [model_cells(results, m) + [cell(m) for cell in columns.values()] for m in results.models]
    dtype = one_dtype(results)
    return Table(title, ["model", f"bytes/token {dtype}" if dtype else "bytes/token", "cache", *columns], rows)


def average_accuracy(model: ModelResult, names: Sequence[str], key: str = "accuracy") -> tuple[float, float] | None:
    """Mean over tasks and its standard error; None unless all of them were measured."""
    measured = [task_numbers(model, name) for name in names]
    if not measured or any(key not in numbers for numbers in measured):
        return None
    errors = [numbers.get("stderr" + key.removeprefix("accuracy")) for numbers in measured]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(known) if len(known) == len(errors) else math.nan
    return mean(n[key] for n in measured), stderr


def accuracy_tables(results: Results) -> Iterator[Table]:
    """Tables of accuracies in per cent, as they are and by the choices' length."""

    def cell(name: str, key: str) -> Callable[[ModelResult], str]:
        def of(model: ModelResult) -> str:
            numbers = task_numbers(model, name)
            return show(numbers.get(key), numbers.get("stderr" + key.removeprefix("accuracy")), factor=100)

        return of

    def average(names: list[str], key: str) -> Callable[[ModelResult], str]:
        def of(model: ModelResult) -> str:
            value, stderr = average_accuracy(model, names, key) or (None, None)
            return show(value, stderr, factor=100)

        return of

    for key, title in (
        ("accuracy", "Multiple choice, accuracy in %"),
        ("accuracy_norm", "Multiple choice, accuracy in % by log-likelihood over length"),
    ):
        names = tasks_with(results, CHOICE_KINDS, key)
        if names:
            columns = {name: cell(name, key) for name in names}
            yield make_table(results, title, {"average": average(names, key)} | columns)
    yield from difference_tables(results)
    names = tasks_with(results, ("retrieval",), "accuracy")
    if names:
        columns = {name: cell(name, "accuracy") for name in names}
        yield make_table(results, "Completed exactly by greedy decoding, in %", columns)


def find_original_row(results: Results) -> ModelResult | None:
    return next((m for m in results.models if m.preset == ORIGINAL), None)


def compared_tasks(results: Results) -> list[str]:
    """Tasks of which it is known item by item who was right."""
    return tasks_with(results, ("choice",), "right_norm")


def paired(model: ModelResult, original: ModelResult, name: str) -> tuple[float, float] | None:
    """Accuracy by length of a model less that of the original on the same items, and its standard error."""
    of_model, reference = (task_numbers(m, name).get("right_norm") for m in (model, original))
    if model is original or of_model is None or reference is None:
        return None
    if model.tasks[name]["digest"] != original.tasks[name]["digest"]:  # other items, in a continued run
        return None
    return paired_difference(of_model, reference)


def average_paired(model: ModelResult, original: ModelResult, names: Sequence[str]) -> tuple[float, float] | None:
    """Mean of [`paired`] over tasks and its standard error; None unless all of them can be compared."""
    known = [pair for pair in (paired(model, original, name) for name in names) if pair is not None]
    if not known or len(known) < len(names):
        return None
    values, errors = zip(*known, strict=True)
    return mean(values), math.hypot(*errors) / len(errors)


def difference_tables(results: Results) -> Iterator[Table]:
    """What each model gained or lost against the original on the same items, in points of accuracy by length."""
    original, names = find_original_row(results), compared_tasks(results)
    if original is None or not names or len(results.models) < 2:
        return

    def average(model: ModelResult) -> str:
        value, stderr = average_paired(model, original, names) or (None, None)
        return show(value, stderr, factor=100)

    def cell(name: str) -> Callable[[ModelResult], str]:
        def of(model: ModelResult) -> str:
            value, stderr = paired(model, original, name) or (None, None)
            return show(value, stderr, factor=100)

        return of

    columns = {"average": average} | {name: cell(name) for name in names}
    title = "Difference from the original on the same items (paired), accuracy by length, in points"
    yield make_table(results, title, columns)


def number_columns(name: str, keys: dict[str, str], digits: int = 2) -> dict[str, Callable[[ModelResult], str]]:
    """Columns of a task's numbers; the keys of standard errors stand behind a colon."""

    def cell(key: str) -> Callable[[ModelResult], str]:
        value, _, stderr = key.partition(":")
        return lambda model: show(task_numbers(model, name).get(value), task_numbers(model, name).get(stderr), digits)

    return {f"{name} {label}".strip(): cell(key) for key, label in keys.items()}


def text_tables(results: Results) -> Iterator[Table]:
    """Tables of perplexity, agreement, and what else lm-evaluation-harness reported."""
    columns: dict[str, Callable[[ModelResult], str]] = {}
    for name in tasks_with(results, ("perplexity",), "perplexity"):
        columns |= number_columns(name, {"perplexity:stderr": ""})
        columns |= number_columns(name, {"bits_per_byte": "bits/byte"}, digits=4)
    if columns:
        yield make_table(results, "Perplexity, bits per byte", columns)

    for name in tasks_with(results, ("agreement",), "kl"):
        keys = {
            "kl:kl_stderr": "KL per token (nats)",
            "top1": "same likeliest token",
            "matched_tokens:matched_stderr": "greedy tokens until the first other one",
            "identical": "identical continuations",
        }
        cells = number_columns(name, keys, digits=3)
        yield make_table(results, name, {label.removeprefix(name + " "): cell for label, cell in cells.items()})

    columns = {}
    for name in dict.fromkeys(n for m in results.models for n, task in m.tasks.items() if task["kind"] == "harness"):
        numbers = next(task_numbers(m, name) for m in results.models if name in m.tasks)
        if "accuracy" not in numbers:
            columns |= number_columns(name, {k: k for k in numbers if "stderr" not in k}, digits=4)
    if columns:
        yield make_table(results, "Other measures of lm-evaluation-harness", columns)
