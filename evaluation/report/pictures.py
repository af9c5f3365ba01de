"""What the report and the evaluation page share: quality against cache size, and self-contained HTML."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")  # files only, no screen

from matplotlib import pyplot
from matplotlib.figure import Figure

STYLE = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
STYLE += "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"
ORIGINAL = "original"


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
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for preset in dict.fromkeys(m.preset for m in measured if m.preset != ORIGINAL):
        points = sorted((m for m in measured if m.preset == preset), key=lambda m: m.cache)
        sizes, values = [m.cache for m in points], [m.value for m in points]
        axes.errorbar(sizes, values, [m.stderr for m in points], marker="o", capsize=3, label=preset)
    for m in measured:
        if m.preset == ORIGINAL:
            axes.axhline(m.value, color="black", linestyle="--", linewidth=1)
            axes.plot([m.cache], [m.value], "k*", markersize=10, label=f"original ({m.cache:g} {unit})")
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def encode_png(figure: Figure) -> bytes:
    """The picture as a PNG file; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()


def html_picture(name: str, png: bytes) -> str:
    """A picture inside the page itself."""
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def html_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain text cells."""
    head = "".join(f"<th>{html.escape(cell)}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def html_page(title: str, body: str) -> str:
    """A page that needs no other file."""
    title = html.escape(title)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}\n"
