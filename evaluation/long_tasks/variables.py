"""`variables`: three things whose number is set twice; the number that one of them has in the end."""

import random

from mha2mla.evaluation.prompts import NOUNS, Example, filler, scatter

NAME = "variables"
COUNT = 3


def make(rng: random.Random, size: int) -> Example:
    """Hidden in `size` sentences."""
    things = rng.sample(NOUNS, COUNT)
    numbers = [str(number) for number in rng.sample(range(1_000, 10_000), 2 * COUNT)]
    order = [*things, *things]
    rng.shuffle(order)
    settings, last = [], {}
    for thing, number in zip(order, numbers, strict=True):
        settings.append(f"{'Now the' if thing in last else 'The'} number of the {thing} is {number}.")
        last[thing] = number
    text, _ = scatter(rng, settings, filler(rng, size))
    asked = rng.choice(things)
    prompt = (
        f"Some things in the following text have a number, which may change. Remember the numbers.\n\n{text}\n\n"
        f"What is the number of the {asked} now? Now the number of the {asked} is"
    )
    return Example(prompt, (last[asked],), 1 / len(numbers))
