"""Table and figure of measured speeds."""

from matplotlib.figure import Figure

from mha2mla.evaluation.report.table import Table

from .measure import Speed


def speed_table(measured: list[Speed], title: str) -> Table:
    header = ["model", "cache", "batch", "context", "first token s", "ms a step", "tokens/s", "cache MB (formula)"]
    header += ["cache MB", "allocated MB", "peak GB"]

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.2f}"

    rows = [
        [
            *(m.model, m.cache, str(m.batch), str(m.context)),
            "-" if m.first_token_s is None else f"{m.first_token_s:.3f}",
            f"{m.step_ms:.2f}",
            f"{m.tokens_per_s:,.1f}",
            *map(megabytes, (m.formula_bytes, m.cache_bytes, m.allocated_bytes)),
            "-" if m.peak_bytes is None else f"{m.peak_bytes / 1e9:.2f}",
        ]
        for m in measured
    ]
    return Table(title, header, rows)


def plot_speed(measured: list[Speed]) -> Figure:
    """Tokens per second and cache bytes against the context, a line for each model, cache and batch."""
    figure = Figure(figsize=(11, 4.5))
    axes = figure.subplots(1, 2)
    for key in dict.fromkeys((m.model, m.cache, m.batch) for m in measured):
        points = sorted((m for m in measured if (m.model, m.cache, m.batch) == key), key=lambda m: m.context)
        label = f"{key[0]}, {key[1]}, batch {key[2]}"
        contexts = [m.context for m in points]
        axes[0].plot(contexts, [m.tokens_per_s for m in points], marker="o", label=label)
        axes[1].plot(contexts, [m.cache_bytes / 1e6 for m in points], marker="o", label=label)
    axes[0].set(xlabel="context, tokens", ylabel="tokens per second", xscale="log", ylim=(0, None))
    axes[1].set(xlabel="context, tokens", ylabel="cache, MB", xscale="log", yscale="log")
    axes[1].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    return figure
