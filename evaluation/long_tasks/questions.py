"""`questions`: where one of four people lives, among many sentences of the same kind about other people."""

import random

from mha2mla.evaluation.prompts import COLORS, FIRST_NAMES, NOUNS, TOWNS, TRADES, Example, scatter

NAME = "questions"
COUNT = 4


def distractor(rng: random.Random, names: list[str]) -> str:
    """Something else of somebody else."""
    kind, name = rng.randrange(3), rng.choice(names)
    if kind == 0:
        return f"{name} works as a {rng.choice(TRADES)}."
    if kind == 1:
        return f"{name} has a {rng.choice(COLORS)} {rng.choice(NOUNS)}."
    return f"{name} once had a friend in {rng.choice(TOWNS)}."


def make(rng: random.Random, size: int) -> Example:
    """Hidden in `size` sentences."""
    names, towns = rng.sample(FIRST_NAMES, len(FIRST_NAMES)), rng.sample(TOWNS, COUNT)
    facts = [f"{name} lives in {town}." for name, town in zip(names, towns, strict=False)]
    text, depths = scatter(rng, facts, [distractor(rng, names[COUNT:]) for _ in range(size)])
    asked = rng.randrange(COUNT)
    prompt = f"{text}\n\nQuestion: Where does {names[asked]} live?\nAnswer: {names[asked]} lives in"
    return Example(prompt, (towns[asked],), 1 / COUNT, depths[asked])
