"""`counting`: the colour with the most of the votes that are told one by one."""

import random

from mha2mla.evaluation.prompts import COLORS, FIRST_NAMES, Example

NAME = "counting"
CHOICES = 4
SHOWN = 8  # votes of the solved example
SHARE = 0.55  # of the votes, for the winner


def votes(rng: random.Random, size: int) -> tuple[str, str]:
    """At least `size` votes, and who has most of them."""
    winner, *others = rng.sample(COLORS, CHOICES)
    ahead = max(2, round(SHARE * size))
    cast = [winner] * ahead + [others[i % len(others)] for i in range(max(1, size - ahead))]
    rng.shuffle(cast)
    return " ".join(f"{rng.choice(FIRST_NAMES)} voted for {color}." for color in cast), winner


def make(rng: random.Random, size: int) -> Example:
    """`size` votes, behind one solved example."""
    told, winner = votes(rng, SHOWN)
    shown = f"{told}\nMost of them voted for {winner}."
    told, winner = votes(rng, size)
    return Example(f"Count the votes.\n\n{shown}\n\n{told}\nMost of them voted for", (winner,), 1 / CHOICES)
