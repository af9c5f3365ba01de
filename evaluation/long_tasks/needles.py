"""`needles`: four numbers, each of another thing, of which one is asked for."""

import random

from mha2mla.evaluation.prompts import NOUNS, Example, filler, scatter

NAME = "needles"
COUNT = 4


def make(rng: random.Random, size: int) -> Example:
    """Hidden in `size` sentences."""
    things = rng.sample(NOUNS, COUNT)
    numbers = [str(number) for number in rng.sample(range(1_000, 10_000), COUNT)]
    facts = [f"The number of the {thing} is {number}." for thing, number in zip(things, numbers, strict=True)]
    text, depths = scatter(rng, facts, filler(rng, size))
    asked = rng.randrange(COUNT)
    prompt = (
        f"Some things in the following text have a number. Remember the numbers.\n\n{text}\n\n"
        f"What is the number of the {things[asked]}? The number of the {things[asked]} is"
    )
    return Example(prompt, (numbers[asked],), 1 / COUNT, depths[asked])
