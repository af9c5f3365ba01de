"""What a conversion did, in pictures: a self-contained HTML page, PNGs, and the main picture in the model card."""

import base64
import html
import io
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no screen

from matplotlib import pyplot
from matplotlib.figure import Figure

RECORD_NAME = "conversion.json"
MAIN_PICTURE = "perplexity.png"

STYLE = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
STYLE += "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"


@dataclass(frozen=True)
class Measured:
    """
    Perplexity of one model on the report's text.

    Attributes:
        name (`str`): The folder's name, or "original".
        preset (`str`): "calibrated", "paper", or "original".
        cache_width (`int`): Numbers cached per token and layer.
        perplexity, stderr (`float`): On the text that the report names.
    """

    name: str
    preset: str
    cache_width: int
    perplexity: float
    stderr: float


def read_record(folder: Path) -> dict:
    """The record that a conversion left; a `ValueError` if there is none."""
    path = folder / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {RECORD_NAME}: give a folder that `mha2mla convert` wrote.")
    return json.loads(path.read_text())


def plot_frequencies(record: dict) -> Figure:
    """How many rotary pairs of each frequency every layer keeps; low indices turn fastest."""
    layers = [list(chain.from_iterable(layer["rope_frequencies"])) for layer in record["layers"]]
    counts = [[layer.count(f) for f in range(max(map(max, layers)) + 1)] for layer in layers]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    image = axes.imshow(counts, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="frequency index (0 turns fastest)", ylabel="layer", title="Rotary pairs kept")
    figure.colorbar(image, label="pairs")
    return figure


def plot_layers(record: dict, names: dict[str, str], title: str, log: bool) -> Figure | None:
    """Measurements of the record by layer; None where the preset did not measure them."""
    if not all(name in record["layers"][0] for name in names):
        return None
    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    for name, label in names.items():
        axes.plot([layer[name] for layer in record["layers"]], marker="o", markersize=3, label=label)
    axes.set(xlabel="layer", title=title)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_perplexity(measured: list[Measured], text: str) -> Figure:
    """Perplexity against cache size, a line for each preset."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    original = [m for m in measured if m.preset == "original"]
    for preset in ("calibrated", "paper"):
        points = sorted((m for m in measured if m.preset == preset), key=lambda m: m.cache_width)
        if points:
            widths, perplexities = [m.cache_width for m in points], [m.perplexity for m in points]
            axes.errorbar(widths, perplexities, [m.stderr for m in points], marker="o", capsize=3, label=preset)
    for m in original:
        axes.axhline(m.perplexity, color="black", linestyle="--", label=f"original ({m.cache_width} numbers)")
    axes.set(
        xlabel="numbers cached per token and layer",
        ylabel="perplexity",
        yscale="log",
        title=f"Perplexity on {text}, before any training",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def write_report(folder: Path, record: dict, measured: list[Measured], text: str) -> Path:
    """
    Write `report.html` and its pictures into the folder, and show the main picture in its model card.

    Args:
        folder (`Path`): Of the conversion that the report is about.
        record (`dict`): From [`read_record`].
        measured (`list[Measured]`): This conversion, others to compare it with, and the original.
        text (`str`): What the perplexities were measured on, for the captions.

    Returns:
        Path of the page.
    """
    energy = {"key_energy_kept": "un-rotated keys", "value_energy_kept": "values"}
    stages = {"unrotation_error": "un-rotation (scores)", "output_error": "residual stream behind the layer"}
    figures = {
        MAIN_PICTURE: plot_perplexity(measured, text),
        "rope_frequencies.png": plot_frequencies(record),
        "latent_energy.png": plot_layers(record, energy, "Energy that the latent keeps", log=False),
        "loss_by_stage.png": plot_layers(record, stages, "Relative squared error by stage", log=True),
    }
    images = []
    for name, figure in figures.items():
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        (folder / name).write_bytes(buffer.getvalue())
        encoded = base64.b64encode(buffer.getvalue()).decode()
        images.append(f'<p><img alt="{name}" src="data:image/png;base64,{encoded}"></p>')
    rows = "".join(
        f"<tr><td>{html.escape(m.name)}</td><td>{m.preset}</td><td>{m.cache_width}</td>"
        f"<td>{m.perplexity:.2f} ± {m.stderr:.2f}</td></tr>"
        for m in measured
    )
    title = html.escape(f"Conversion of {record['source']}")
    options = html.escape(json.dumps(record["options"], indent=2))
    page = folder / "report.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        f"<p>{record['source_cache_width']} → {record['cache_width']} numbers per token and layer, "
        f"{record['seconds']} s.</p><table><tr><th>model<th>preset<th>cache<th>perplexity on {html.escape(text)}</tr>"
        f"{rows}</table>{''.join(images)}<h2>Options</h2><pre>{options}</pre>\n",
        encoding="utf-8",
    )
    show_in_card(folder / "README.md", text)
    return page


def show_in_card(card: Path, text: str) -> None:
    """Put the main picture into a model card, once."""
    content = card.read_text(encoding="utf-8")
    if MAIN_PICTURE not in content:
        section = f"## Perplexity\n\n![Perplexity against cache size on {text}]({MAIN_PICTURE})\n\n## Recipe\n"
        card.write_text(content.replace("## Recipe\n", section, 1), encoding="utf-8")
