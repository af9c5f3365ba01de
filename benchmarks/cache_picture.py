"""The README's picture: bytes of cache a token against what they cost, of the original's cache and of conversions'.

    python benchmarks/cache_picture.py docs/cache.svg

Every figure is read from `docs/dev/pareto.jsonl`, which `pareto.py` wrote.
"""

import argparse
from pathlib import Path

from pareto import PLAIN, points_lost
from recovery_table import ORIGINAL, read_results

ROWS = Path(__file__).parents[1] / "docs" / "dev" / "pareto.jsonl"
TEXT = "corpus"
GREY, ORANGE = "#808080", "#d9822b"  # to be read on white and on black
# Forms of the conversions' latents that are drawn, each a line over their sizes.
LATENTS = {PLAIN: ("16 bits", "#8a9fd6"), "fp8": ("fp8", "#3b7dd8"), "int4": ("4 bits", "#1b4f9c")}


def main() -> None:
    from matplotlib import rc
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()

    rows = sorted(read_results(ROWS), key=lambda row: row["bytes"])
    original = next(row for row in rows if (row["model"], row["cache"]) == (ORIGINAL, PLAIN))
    quantised = [row for row in rows if row["model"] == ORIGINAL and row is not original]

    def divergence(row: dict) -> tuple[float, float]:
        return row["text"][TEXT]["kl"]

    def lost(row: dict) -> tuple[float, float]:
        return points_lost(row, original, list(original["right"]))

    rc("svg", fonttype="none", hashsalt="mha2mla")
    rc("font", family="sans-serif")
    rc("axes", edgecolor=GREY, labelcolor=GREY)
    for part in ("text", "xtick", "ytick"):
        rc(part, color=GREY)
    figure = Figure(figsize=(10, 5), layout="constrained", facecolor="none")
    for axes, measure, label in zip(
        figure.subplots(1, 2),
        (divergence, lost),
        ("KL to the original, nats a token", f"points of accuracy lost, {len(original['right'])} sets"),
        strict=True,
    ):
        groups = [("original, cache quantised", ORANGE, "^", quantised)]
        for form, (name, color) in LATENTS.items():
            members = [row for row in rows if row["model"] != ORIGINAL and row["cache"] == form]
            groups.append((f"converted and recovered, {name}", color, "o-", members))
        for name, color, marker, members in groups:
            members = [row for row in members if measure is divergence or row["right"]]
            if not members:
                continue
            sizes = [row["bytes"] for row in members]
            values, errors = zip(*map(measure, members), strict=True)
            axes.errorbar(sizes, values, errors, fmt=marker, color=color, label=name, capsize=3, linewidth=1.2)
        for row in quantised:
            if measure is lost and not row["right"]:
                continue
            value, error = measure(row)
            if value > 2 * error:  # those at zero would cover each other
                style = dict(textcoords="offset points", color=ORANGE, fontsize="x-small")
                axes.annotate(row["cache"], (row["bytes"], value), (5, 5), **style)
        drawn = [row for row in rows if row["cache"] in (PLAIN, "int4") and row not in quantised]
        ticks = sorted({row["bytes"] for row in drawn})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=45)
        axes.minorticks_off()
        axes.set(xlabel="bytes of cache per token", ylabel=label)
        axes.set_facecolor("none")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if measure is divergence:
            axes.set_yscale("log")
            handles = axes.get_legend_handles_labels()
        else:
            axes.axhline(0, color=GREY, linewidth=0.8)
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct: what a smaller cache costs", color=GREY)
    figure.savefig(args.output, metadata={"Date": None}, transparent=True)


if __name__ == "__main__":
    main()
