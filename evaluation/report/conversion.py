"""What a conversion did, from the record that it left: which frequencies kept RoPE, what the latent keeps of keys and
values, and where the loss comes from."""

import html
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mha2mla.common.records import RECORD_NAME, read_record

from .figures import encode_png
from .html import html_picture

# What the pictures and the page read of a record.
READ = ("source", "source_cache_width", "cache_width", "seconds", "options", "layers")


def find_records(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """
    The records of those models that are conversions and lie on this machine.

    Raises:
        ValueError: If one is malformed.
    """
    records = {path: read_record(path) for path in dict.fromkeys(paths) if (Path(path) / RECORD_NAME).is_file()}
    for path, record in records.items():
        if missing := [name for name in READ if name not in record]:
            raise ValueError(f"{Path(path) / RECORD_NAME} has no {missing[0]!r}: convert again, or remove the file.")
    return records


def plot_frequencies(record: dict) -> Figure:
    """How many rotary pairs of each frequency every layer keeps; low indices turn fastest."""
    layers = [list(chain.from_iterable(layer["rope_frequencies"])) for layer in record["layers"]]
    counts = [[layer.count(f) for f in range(max(map(max, layers)) + 1)] for layer in layers]
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    image = axes.imshow(counts, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="frequency index (0 turns fastest)", ylabel="layer", title="Rotary pairs kept")
    figure.colorbar(image, label="pairs")
    return figure


def plot_layers(record: dict, names: dict[str, str], title: str, log: bool) -> Figure | None:
    """Measurements of the record by layer; None where the preset did not measure them."""
    if not all(name in record["layers"][0] for name in names):
        return None
    figure = Figure(figsize=(8, 3.5))
    axes = figure.subplots()
    for name, label in names.items():
        axes.plot([layer[name] for layer in record["layers"]], marker="o", markersize=3, label=label)
    axes.set(xlabel="layer", title=title)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def conversion_figures(record: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The figures by name; those by layer only where the preset measured them."""
    energy = {"key_energy_kept": "un-rotated keys", "value_energy_kept": "values"}
    stages = {
        "unrotation_error": "scores, after the keys were un-rotated",
        "output_error": "all that the converted layers pass on so far",
    }
    figures = {
        "rope_frequencies": plot_frequencies(record),
        "latent_energy": plot_layers(record, energy, "Share of their energy that the latent keeps", log=False),
        "loss_by_stage": plot_layers(record, stages, "Relative squared error, layer by layer", log=True),
    }
    yield from ((name, figure) for name, figure in figures.items() if figure is not None)


def conversion_section(name: str, record: dict[str, Any]) -> str:
    """The conversion as a part of a page."""
    sizes = f"{record['source_cache_width']} → {record['cache_width']} values per token and layer"
    pictures = "".join(html_picture(name, encode_png(figure)) for name, figure in conversion_figures(record))
    options = html.escape(json.dumps(record["options"], indent=2))
    title = html.escape(f"Conversion {name} of {record['source']}")
    return f"<h2>{title}</h2><p>{sizes}, {record['seconds']} s.</p>{pictures}<pre>{options}</pre>"
