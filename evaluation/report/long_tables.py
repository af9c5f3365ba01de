"""Tables of long context: perplexity by position, and the generated tasks by length."""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from mha2mla.evaluation.measures.multiple_choice import mean_stderr
from mha2mla.evaluation.results import ModelResult, Results

from .table import Table, show
from .tables import find_original_row, make_table, task_numbers, tasks_with

Part = dict[str, Any]  # a range of positions, or a length of prompts


def part_cells(name: str, parts: str, cell: Callable[[Part], str], count: int) -> list[Callable[[ModelResult], str]]:
    """A column for each part of a task; "-" where a model has no such part."""

    def of(index: int) -> Callable[[ModelResult], str]:
        def shown(model: ModelResult) -> str:
            measured = task_numbers(model, name).get(parts, [])
            return cell(measured[index]) if index < len(measured) else "-"

        return shown

    return [of(index) for index in range(count)]


def paired_cells(
    results: Results, name: str, parts: str, key: str, count: int, factor: float, digits: int
) -> list[Callable[[ModelResult], str]]:
    """A part's numbers less the original's on the same items, mean and standard error; `key` is their name."""
    original = find_original_row(results)

    def of(index: int) -> Callable[[ModelResult], str]:
        def shown(model: ModelResult) -> str:
            if original is None or model is original or name not in model.tasks or name not in original.tasks:
                return "-"
            mine, other = (task_numbers(m, name).get(parts, [])[index : index + 1] for m in (model, original))
            same = model.tasks[name]["digest"] == original.tasks[name]["digest"]  # or other items, in a continued run
            if not same or not mine or not other or key not in mine[0] or key not in other[0]:
                return "-"
            differences = [a - b for a, b in zip(mine[0][key], other[0][key], strict=True)]
            return show(mean(differences), mean_stderr(differences), digits, factor)

        return shown

    return [of(index) for index in range(count)]


def longest(results: Results, name: str, parts: str) -> list[Part]:
    """The parts of a task of the model that has most: a shorter context has fewer."""
    return max((task_numbers(model, name).get(parts, []) for model in results.models), key=len)


def position_tables(results: Results) -> Iterator[Table]:
    for name in tasks_with(results, ("positions",), "ranges"):
        ranges = longest(results, name, "ranges")
        heads = [f"{r['begin']}-{r['end'] - 1}" for r in ranges]
        cells = part_cells(name, "ranges", lambda r: show(r["perplexity"], r["stderr"]), len(ranges))
        yield make_table(results, f"{name}: perplexity by position", dict(zip(heads, cells, strict=True)))
        if find_original_row(results) is not None and len(results.models) > 1:
            cells = paired_cells(results, name, "ranges", "losses", len(ranges), factor=1, digits=4)
            title = f"{name}: loss by position less the original's on the same documents (paired), in nats"
            yield make_table(results, title, dict(zip(heads, cells, strict=True)))


def generated_tables(results: Results) -> Iterator[Table]:
    for name in tasks_with(results, ("long",), "lengths"):
        lengths = longest(results, name, "lengths")
        heads = [f"{part['length']:,} tokens" for part in lengths]
        cells = part_cells(name, "lengths", lambda p: show(p["score"], p["stderr"], 1, 100), len(lengths))
        chance = ", ".join(f"{100 * part['chance']:.1f}" for part in lengths)
        title = f"{name}: share of the answers written, in % (by guessing {chance})"
        yield make_table(results, title, dict(zip(heads, cells, strict=True)))
        if find_original_row(results) is not None and len(results.models) > 1:
            cells = paired_cells(results, name, "lengths", "scores", len(lengths), factor=100, digits=1)
            title = f"{name}: difference from the original on the same prompts (paired), in points"
            yield make_table(results, title, dict(zip(heads, cells, strict=True)))


def long_tables(results: Results) -> Iterator[Table]:
    """By position and by length, each also against the original."""
    yield from position_tables(results)
    yield from generated_tables(results)
