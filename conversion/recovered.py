"""What conversions of one model had lost before and after recovery, for the command line to quote: the tables of
docs/conversion.md and docs/recovery.md. Nothing is known of another model before it is measured."""

MODEL = "SmolLM2-135M-Instruct"
# Points of accuracy lost over seven multiple-choice sets, and their standard error, of each run: by the cache in % of
# the original's, and by millions of tokens of training.
POINTS_LOST: dict[float, dict[int, list[tuple[float, float]]]] = {
    31.25: {20: [(0.79, 0.38)], 78: [(0.46, 0.37), (0.80, 0.38)]},
    18.75: {20: [(2.04, 0.45)], 78: [(0.99, 0.42)]},
    12.5: {20: [(3.09, 0.51)], 78: [(1.93, 0.46)]},
}
LEAST = min(POINTS_LOST)
PERPLEXITY = {100.0: 18.5, LEAST: 110.5}  # on WikiText-2 before recovery, by the cache in % of the original's
SMALL = (
    f"less of the cache than was ever measured. At {LEAST:g} % the perplexity of {MODEL} on WikiText-2 rises from "
    f"{PERPLEXITY[100]} to {PERPLEXITY[LEAST]} before recovery; a smaller cache loses more, down to text without sense"
)


def is_small(ratio: float) -> bool:
    """Whether a cache of this share of the original's is smaller than any that was measured. The sizes that make up a
    ratio are whole numbers, and may miss it by a little."""
    return 100 * ratio < LEAST - 0.5
