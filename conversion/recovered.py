"""What conversions of one model had lost before and after recovery, for the command line to quote: the tables of
docs/conversion.md and docs/recovery.md. Nothing is known of another model before it is measured."""

MODEL = "SmolLM2-135M-Instruct"
TOKENS = 110  # millions of recovery
# Points of accuracy lost after it over seven multiple-choice sets, and their standard error, by the cache in % of the
# original's.
POINTS_LOST = {31.25: (0.59, 0.37), 18.75: (0.95, 0.42), 12.5: (1.64, 0.46)}
LEAST = min(POINTS_LOST)
PERPLEXITY = {100.0: 18.5, LEAST: 110.5}  # on WikiText-2 before recovery, by the cache in % of the original's
SMALL = (
    f"less of the cache than was ever measured. At {LEAST:g} % the perplexity of {MODEL} on WikiText-2 rises from "
    f"{PERPLEXITY[100]} to {PERPLEXITY[LEAST]} before recovery; a smaller cache loses "
    "more. How much another model bears nobody has measured"
)


def is_small(ratio: float) -> bool:
    """Whether a cache of this share of the original's is smaller than any that was measured. The sizes that make up a
    ratio are whole numbers, and may miss it by a little."""
    return 100 * ratio < LEAST - 0.5
