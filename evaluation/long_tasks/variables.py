"""`variables`: three variables, each set twice; the value that one of them has in the end."""

import random

from mha2mla.evaluation.prompts import NOUNS, Example, filler, scatter

NAME = "variables"
COUNT = 3
TIMES = 2


def make(rng: random.Random, size: int) -> Example:
    """Hidden in `size` sentences."""
    names = rng.sample(NOUNS, COUNT)
    values = [str(value) for value in rng.sample(range(1_000, 10_000), COUNT * TIMES)]
    order = [*range(COUNT)] * TIMES
    rng.shuffle(order)
    settings = [f"The value of {names[which]} is now {value}." for which, value in zip(order, values, strict=True)]
    text, _ = scatter(rng, settings, filler(rng, size))
    asked = rng.randrange(COUNT)
    last = max(place for place, which in enumerate(order) if which == asked)
    prompt = (
        f"Values are set in the following text. A new value replaces the old one.\n\n{text}\n\n"
        f"In the end, the value of {names[asked]} is now"
    )
    return Example(prompt, (values[last],), 1 / len(values))
