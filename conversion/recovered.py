"""What conversions of one model had lost before and after recovery, for the command line to quote: the tables of
docs/conversion.md and docs/recovery.md. Nothing is known of another model before it is measured."""

import math

MODEL = "SmolLM2-135M-Instruct"
TOKENS = "112"  # millions of recovery
# Points of accuracy lost after it over seven multiple-choice sets, and their standard error, by the cache in % of the
# original's, split as `--cache-ratio` does, by the recipe but for its optimiser (Muon), on text of which a quarter was
# the original's own.
POINTS_LOST = {31.25: (0.51, 0.37), 18.75: (1.46, 0.42), 12.5: (1.70, 0.45)}
LOST = {size: f"{points:.2f} ± {error:.2f}" for size, (points, error) in POINTS_LOST.items()}  # for a person
LEAST = min(POINTS_LOST)
LOST_BELOW = (6.25, 3.99, 0.54)  # the same with this % of the cache, after 55M tokens
SMALL = (
    "less of the cache than is known to hold. With {:g} % {} lost {} ± {} points of accuracy after recovery, "
    "{} with {:g} %; guessing loses 9. How much another model bears nobody has measured"
).format(LOST_BELOW[0], MODEL, *LOST_BELOW[1:], LOST[LEAST], LEAST)


def is_small(ratio: float) -> bool:
    """Whether a cache of this share of the original's is smaller than any that held. The sizes that make up a ratio
    are whole numbers, and may miss it by a little."""
    return 100 * ratio < LEAST - 0.5


def expectation(ratio: float) -> str:
    """For a person: what was lost after recovery by the size that is nearest to this share of the original's cache."""
    if is_small(ratio):
        return f"{100 * ratio:.3g} % is {SMALL}"
    nearest = min(POINTS_LOST, key=lambda size: abs(math.log(size / (100 * ratio))))
    return (
        f"{MODEL}, at {nearest:g} % of its cache (the nearest size measured), was {LOST[nearest]} points of accuracy "
        f"below the original after {TOKENS} million tokens of training (docs/recovery.md)"
    )
