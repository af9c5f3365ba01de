"""The README's picture: bytes of cache a token against points lost, of conversions and of the original's own cache.

    python benchmarks/cache_picture.py docs/cache.svg

Every figure is read from the pages in docs/dev: conversions from `recovery.jsonl`, quantised caches of the original
from the first table of section (c) of `results.md`, which says how they were measured.
"""

import argparse
import re
from pathlib import Path

from recovery_table import ORIGINAL, points_lost, read_results

from mha2mla.evaluation.measures.multiple_choice import paired_difference

PAGES = Path(__file__).parents[1] / "docs" / "dev"
ORIGINAL_BYTES = 23_040  # SmolLM2-135M in 16 bits: 30 layers x 384 values x 2
BYTES = {"31": 7_200, "19": 4_320, "12": 2_880}  # 120, 72 and 48 values instead
NUM_ITEMS = 300  # of ARC-Easy, the first: those of the quantised caches
QUANTISED = re.compile(r"\| original, (int\d) \(\w+\) \| ([\d,]+) \| [^|]+ \| [^|]+ \| (-?[\d.]+) ± ([\d.]+) \|")


def quantised_caches(page: str) -> dict[str, tuple[int, float, float]]:
    """Bytes a token, points lost and their standard error of the original's quantised caches, by format."""
    return {
        name: (int(size.replace(",", "")), -float(difference), float(error))
        for name, size, difference, error in QUANTISED.findall(page)
    }


def recovered(rows: list[dict]) -> list[dict]:
    """The rows in bold of the table: what was trained longest at each size, without the second run at 31 %."""
    names = ("calibrated-31", "calibrated-19", "calibrated-12-512-attention-rate")
    longest = max(row["run"]["tokens"] for row in rows)
    return [row for name in names for row in rows if row["run"]["model"] == name and row["run"]["tokens"] == longest]


def arc_easy_lost(row: dict, original: dict) -> tuple[float, float]:
    """Points lost on the items that the quantised caches were measured on, and their standard error."""
    mine, other = (source["right"]["arc_easy"][:NUM_ITEMS] for source in (row, original))
    difference, error = paired_difference(mine, other)
    return -100 * difference, 100 * error


def main() -> None:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()

    rows = read_results(PAGES / "recovery.jsonl")
    original = next(row for row in rows if row["run"]["model"] == ORIGINAL)
    trained = recovered(rows)
    sizes = [BYTES[row["run"]["model"].split("-")[1]] for row in trained]
    caches = quantised_caches((PAGES / "results.md").read_text(encoding="utf-8"))

    grey = "#808080"  # to be read on white and on black
    rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "mha2mla", "font.family": "sans-serif", "text.color": grey}
        | {f"{part}color": grey for part in ("axes.edge", "axes.label", "xtick.", "ytick.")}
    )
    figure = Figure(figsize=(8, 4.4), layout="constrained", facecolor="none")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.axhline(0, color=grey, linewidth=0.8)
    axes.plot([ORIGINAL_BYTES], [0], "s", color=grey, label="original, 16 bits")
    style = dict(capsize=3, linewidth=1.2)
    x, y, error = zip(*caches.values(), strict=True)
    axes.errorbar(
        x, y, error, fmt="^", color="#d9822b", label=f"original, cache quantised: {NUM_ITEMS} questions", **style
    )
    for name, (size, lost, _) in caches.items():
        axes.annotate(name, (size, lost), (6, 6), textcoords="offset points", color="#d9822b")
    for measure, shift, fmt, label in (
        (arc_easy_lost, 1.04, "o", f"converted and recovered: the same {NUM_ITEMS} questions"),
        (points_lost, 0.96, "D", "converted and recovered: seven sets, 7,574 questions"),
    ):
        y, error = zip(*(measure(row, original) for row in trained), strict=True)
        color = "#8a9fd6" if measure is arc_easy_lost else "#3b7dd8"
        axes.errorbar([shift * size for size in sizes], y, error, fmt=f"{fmt}-", color=color, label=label, **style)
    ticks = sorted({ORIGINAL_BYTES, *sizes, *(size for size, _, _ in caches.values())} - {6_480, 3_600})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set(xlabel="bytes of cache per token", ylabel="points of accuracy lost")
    axes.set_title("SmolLM2-135M-Instruct: what a smaller cache costs", color=grey)
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(args.output, metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main()
