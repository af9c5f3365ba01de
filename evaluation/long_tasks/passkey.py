"""`passkey`: a number of five digits, told once in a text that says nothing else."""

import random

from mha2mla.evaluation.prompts import Example, filler, scatter

NAME = "passkey"


def make(rng: random.Random, size: int) -> Example:
    """Hidden in `size` sentences."""
    key = str(rng.randint(10_000, 99_999))
    text, (depth,) = scatter(rng, [f"The pass key is {key}. Remember it: {key} is the pass key."], filler(rng, size))
    prompt = (
        f"A pass key is hidden in the following text. Find it and remember it.\n\n{text}\n\n"
        "What is the pass key? The pass key is"
    )
    return Example(prompt, (key,), 0.0, depth)
