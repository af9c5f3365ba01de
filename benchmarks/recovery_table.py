"""The rows that `recovery.py` writes, as a table and as curves."""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from mha2mla.evaluation.measures.multiple_choice import paired_difference

ORIGINAL = "original"
SETS = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "mmlu")


@dataclass(frozen=True)
class Run:
    """What makes a row of the table."""

    model: str
    trainable: str
    distillation: float
    tokens: int

    @property
    def key(self) -> tuple:
        return (self.model, self.trainable, self.distillation, self.tokens)

    @property
    def name(self) -> str:
        return f"{self.model}/{self.trainable}/{self.distillation:g}/{self.tokens / 1e6:g}M"


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_table(args: argparse.Namespace) -> None:
    rows = read_results(args.results)
    original = next((row for row in rows if row["run"]["model"] == ORIGINAL and not row["run"]["tokens"]), None)
    texts = list(dict.fromkeys(name for row in rows for name in row.get("perplexity", {})))
    measured = list(dict.fromkeys(name for row in rows for name in row.get("divergence", {})))
    names = ["model", "trained", "distillation", "tokens", "perplexity", *texts, *(f"KL, {name}" for name in measured)]
    names += ["preference error", "accuracy", "lost", "tokens/s"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        run = Run(**row["run"])
        accuracy, error = (100 * value for value in row["accuracy"]["average"])
        perplexities = [row["eval_perplexity"], *(row.get("perplexity", {}).get(name) for name in texts)]
        divergences = [row.get("divergence", {}).get(name) for name in measured]
        cells = [f"{value[0]:.2f} ± {value[1]:.2f}" if value else "" for value in perplexities]
        cells += ["" if value is None else f"{value:.3f}" for value in divergences]
        preference = f"{row['preference_error']['average']:.3f}" if "preference_error" in row else ""
        speed = "" if math.isnan(row["tokens_per_second"]) else f"{row['tokens_per_second']:,.0f}"
        print(
            f"| {run.model} | {run.trainable} | {run.distillation:g} | {run.tokens / 1e6:g}M "
            f"| {' | '.join(cells)} | {preference} | {accuracy:.2f} ± {error:.2f} "
            f"| {lost(row, original)} | {speed} |"
        )
    if args.plot:
        draw(rows, original, args.plot)


def points_lost(row: dict, original: dict) -> tuple[float, float]:
    """Points of average accuracy against the untrained original, and the standard error over the same items."""
    points = 100 * (original["accuracy"]["average"][0] - row["accuracy"]["average"][0])
    if not (row.get("right") and original.get("right")):  # rows from before items were kept
        return points, math.nan
    errors = [paired_difference(row["right"][name], original["right"][name])[1] for name in SETS]
    return points, 100 * math.hypot(*errors) / len(errors)


def lost(row: dict, original: dict | None) -> str:
    if original is None or row is original:
        return ""
    points, error = points_lost(row, original)
    return f"{points:.2f}" if math.isnan(error) else f"{points:.2f} ± {error:.2f}"


def draw(rows: list[dict], original: dict | None, path: Path) -> None:
    """Loss and accuracy lost against tokens, a line for each model and way of training."""
    from matplotlib.figure import Figure

    if original is None:
        raise ValueError(f"The plot needs the row {Run(ORIGINAL, 'none', 0.0, 0).name}: measure it with `run --only`.")
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups: dict[str, list[dict]] = {}
    untrained = {row["run"]["model"]: row for row in rows if row["run"]["tokens"] == 0}
    for row in rows:
        run = Run(**row["run"])
        if run.tokens:
            label = f"{run.model}, {run.trainable}" + (f", distilled {run.distillation:g}" if run.distillation else "")
            groups.setdefault(label, [untrained[run.model]] if run.model in untrained else []).append(row)
    for number, (label, members) in enumerate(groups.items()):
        members.sort(key=lambda row: row["run"]["tokens"])
        tokens = [row["run"]["tokens"] / 1e6 for row in members]
        left.plot(tokens, [math.log(row["eval_perplexity"][0]) for row in members], marker="o", label=label)
        points, errors = zip(*(points_lost(row, original) for row in members), strict=True)
        beside = [count * 1.03 ** (number - (len(groups) - 1) / 2) for count in tokens]  # or errors hide one another
        right.errorbar(beside, points, errors, marker="o", capsize=3, label=label)
    for axes, level in ((left, math.log(original["eval_perplexity"][0])), (right, 0)):
        axes.axhline(level, color="grey", linestyle="--", label=ORIGINAL)
    budgets = sorted({row["run"]["tokens"] / 1e6 for members in groups.values() for row in members})
    for axes, title in ((left, "validation loss (nats per token)"), (right, "average accuracy lost (points)")):
        axes.set(xlabel="tokens (millions)", title=title)
        if budgets[0]:
            axes.set_xscale("log")
        else:
            smallest = min(budgets[1:], default=1)
            axes.set_xscale("symlog", linthresh=smallest)
            axes.set_xlim(left=-smallest / 4)
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets], minor=False)
        axes.minorticks_off()
    right.invert_yaxis()
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
