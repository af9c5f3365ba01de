"""Figures of an evaluation: quality against cache size, retrieval by depth and length, perplexity by position."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, PercentFormatter

from mha2mla.evaluation.results import ORIGINAL, ModelResult, Results

from .tables import CHOICE_KINDS, average_accuracy, task_numbers, tasks_with

# Presets in the words of a legend; one that is not here has its own name.
PRESETS = {
    "calibrated": "converted (calibrated)",
    "paper": "converted as in the paper MHA2MLA",
    "other": "no record of a conversion",
}


@dataclass(frozen=True)
class Measured:
    """
    Quality of one model at its cache size.

    Attributes:
        name (`str`): The folder's name, or "original".
        preset (`str`): "calibrated", "paper", ...: models of one preset are joined by a line; or "original".
        cache (`float`): Size of its cache, in the picture's unit.
        value, stderr (`float`): The quality, for example a perplexity, and its standard error.
    """

    name: str
    preset: str
    cache: float
    value: float
    stderr: float


def plot_against_cache(
    measured: Sequence[Measured], xlabel: str, ylabel: str, title: str, log: bool, unit: str
) -> Figure:
    """Quality against cache size, a line for each preset, a star and a dashed line for the original."""
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for preset in dict.fromkeys(m.preset for m in measured if m.preset != ORIGINAL):
        points = sorted((m for m in measured if m.preset == preset), key=lambda m: m.cache)
        sizes, values = [m.cache for m in points], [m.value for m in points]
        axes.errorbar(
            sizes, values, [m.stderr for m in points], marker="o", capsize=3, label=PRESETS.get(preset, preset)
        )
    for m in measured:
        if m.preset == ORIGINAL:
            axes.axhline(m.value, color="black", linestyle="--", linewidth=1)
            axes.plot([m.cache], [m.value], "k*", markersize=10, label=f"original ({m.cache:,.0f} {unit})")
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear", title=title)
    if log:  # plain numbers, not powers
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def encode_png(figure: Figure) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()


def can_be_drawn(value: float | None) -> TypeGuard[float]:
    """Not infinity, which a perplexity may be and which a file of results has no number for."""
    return value is not None and math.isfinite(value)


def plot_positions(results: Results, name: str) -> Figure | None:
    """Perplexity by position, a line for each model; None where none has a number."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for model in results.models:
        ranges = [r for r in task_numbers(model, name).get("ranges", []) if can_be_drawn(r["perplexity"])]
        if ranges:
            ends, values = [r["end"] for r in ranges], [r["perplexity"] for r in ranges]
            axes.plot(ends, values, marker="o", markersize=3, label=model.label)
    if not axes.lines:
        return None
    axes.set(xlabel="position in the document (end of the range)", ylabel="perplexity", title=name)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def plot_retrieval(model: ModelResult, name: str) -> Figure:
    """A heat map of retrieval by depth and length; white where nothing was measured."""
    cells = task_numbers(model, name)["cells"]
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
    image = [[math.nan] * len(lengths) for _ in depths]
    for cell in cells:
        image[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell["accuracy"]
    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    drawn = axes.imshow(image, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(lengths)), [f"{length:g}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="length (tokens)", ylabel="depth", title=f"{name}: {model.label}")
    figure.colorbar(drawn, label="retrieved", format=PercentFormatter(1))
    return figure


def measured_points(
    results: Results, numbers_of: Callable[[ModelResult], tuple[float, float] | None]
) -> list[Measured]:
    """Points of the picture of quality against cache size, of the models that have both."""
    points = []
    for model in results.models:
        quality = numbers_of(model)
        if quality is not None:
            value, stderr = quality
            points.append(Measured(model.label, model.preset, model.cache_bytes_per_token, value, stderr))
    return points


def against_cache(results: Results) -> Iterator[tuple[str, Figure]]:
    """Quality against cache size by name: the mean accuracy, and each perplexity."""

    def plot(points: list[Measured], ylabel: str, title: str, log: bool) -> Figure:
        return plot_against_cache(points, "bytes of cache per token (measured)", ylabel, title, log, "bytes")

    choices = tasks_with(results, CHOICE_KINDS, "accuracy")

    def accuracy(model: ModelResult) -> tuple[float, float] | None:
        numbers = average_accuracy(model, choices)
        return None if numbers is None else (100 * numbers[0], 100 * numbers[1])

    points = measured_points(results, accuracy)
    if points:
        title = f"{choices[0] if len(choices) == 1 else f'Mean of {len(choices)} tasks'} against cache size"
        yield "accuracy", plot(points, "accuracy in %", title, log=False)
    for name in tasks_with(results, ("perplexity",), "perplexity"):

        def perplexity(model: ModelResult, name: str = name) -> tuple[float, float] | None:
            numbers = task_numbers(model, name)
            value, stderr = numbers.get("perplexity"), numbers.get("stderr")
            return (value, math.nan if stderr is None else stderr) if can_be_drawn(value) else None

        points = measured_points(results, perplexity)
        if points:
            yield f"perplexity-{name}", plot(points, "perplexity", f"{name} against cache size", log=True)


def make_figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Quality against cache size, heat maps of retrieval, and perplexity by position."""
    yield from against_cache(results)
    for name in tasks_with(results, ("retrieval", "long"), "cells"):
        for model in results.models:
            if task_numbers(model, name).get("cells"):
                yield f"{name}-{model.label}", plot_retrieval(model, name)
    for name in tasks_with(results, ("positions",), "ranges"):
        figure = plot_positions(results, name)
        if figure is not None:
            yield name, figure
