"""`counting`: which of three colours has most of the votes of a list."""

import random

from mha2mla.evaluation.prompts import COLORS, Example

NAME = "counting"
CHOICES = 3
SHOWN = 2  # solved examples,
SHOWN_VOTES = 9  # of so many votes each
SHARE = 0.6  # of the votes, for the winner


def votes(rng: random.Random, size: int) -> tuple[list[str], str]:
    """At least three votes, and who has most of them."""
    winner, *others = rng.sample(COLORS, CHOICES)
    ahead = max(2, round(SHARE * size))
    cast = [winner] * ahead + [others[i % len(others)] for i in range(max(1, size - ahead))]
    rng.shuffle(cast)
    return cast, winner


def make(rng: random.Random, size: int) -> Example:
    """About `size` votes, behind the solved examples."""
    parts = []
    for _ in range(SHOWN):
        cast, winner = votes(rng, SHOWN_VOTES)
        parts.append(f"Votes: {', '.join(cast)}.\nWinner: {winner}.")
    cast, winner = votes(rng, size)
    return Example("\n\n".join([*parts, f"Votes: {', '.join(cast)}.\nWinner:"]), (winner,), 1 / CHOICES)
