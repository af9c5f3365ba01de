"""What a conversion did, in pictures: a self-contained HTML page, PNGs, and the main picture in the model card."""

import html
import json
from itertools import chain
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure

from .pictures import Measured, encode_png, html_page, html_picture, html_table, plot_against_cache

MAIN_PICTURE = "perplexity.png"


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


def write_report(folder: Path, record: dict, measured: list[Measured], text: str) -> Path:
    """
    Write `report.html` and its pictures into the folder, and show the main picture in its model card.

    Args:
        folder (`Path`): Of the conversion that the report is about.
        record (`dict`): From [`~mha2mla.common.records.read_record`].
        measured (`list[Measured]`): This conversion, others to compare it with, and the original.
        text (`str`): What the perplexities were measured on, for the captions.

    Returns:
        Path of the page.
    """
    energy = {"key_energy_kept": "un-rotated keys", "value_energy_kept": "values"}
    stages = {"unrotation_error": "un-rotation (scores)", "output_error": "residual stream behind the layer"}
    figures = {
        MAIN_PICTURE: plot_against_cache(
            measured,
            xlabel="numbers cached per token and layer",
            ylabel="perplexity",
            title=f"Perplexity on {text}, before any training",
            log=True,
            unit="numbers",
        ),
        "rope_frequencies.png": plot_frequencies(record),
        "latent_energy.png": plot_layers(record, energy, "Energy that the latent keeps", log=False),
        "loss_by_stage.png": plot_layers(record, stages, "Relative squared error by stage", log=True),
    }
    images = []
    for name, figure in figures.items():
        if figure is None:
            continue
        png = encode_png(figure)
        (folder / name).write_bytes(png)
        images.append(html_picture(name, png))
    table = html_table(
        ("model", "preset", "cache", f"perplexity on {text}"),
        [(m.name, m.preset, f"{m.cache:g}", f"{m.value:.2f} ± {m.stderr:.2f}") for m in measured],
    )
    options = html.escape(json.dumps(record["options"], indent=2))
    page = folder / "report.html"
    sizes = f"{record['source_cache_width']} → {record['cache_width']} numbers per token and layer"
    body = f"<p>{sizes}, {record['seconds']} s.</p>{table}{''.join(images)}<h2>Options</h2><pre>{options}</pre>"
    page.write_text(html_page(f"Conversion of {record['source']}", body), encoding="utf-8")
    show_in_card(folder / "README.md", text)
    return page


def show_in_card(card: Path, text: str) -> None:
    """Put the main picture into a model card, once."""
    content = card.read_text(encoding="utf-8")
    if MAIN_PICTURE not in content:
        section = f"## Perplexity\n\n![Perplexity against cache size on {text}]({MAIN_PICTURE})\n\n## Recipe\n"
        card.write_text(content.replace("## Recipe\n", section, 1), encoding="utf-8")
