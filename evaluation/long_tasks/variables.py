"""`variables`: three numbers that are copied into a variable each, and on into another; where one of them went."""

import random

from mha2mla.evaluation.prompts import NOUNS, Example, filler, scatter

NAME = "variables"
CHAINS = 3
STEPS = 2


def assignments(rng: random.Random) -> tuple[list[str], str, list[str]]:
    """Copies of all chains, mixed, but each chain's in order; the number that begins one, and its variables."""
    names = [name.upper() for name in rng.sample(NOUNS, CHAINS * STEPS)]
    starts = [str(value) for value in rng.sample(range(10_000, 100_000), CHAINS)]
    chains = [[start, *names[i::CHAINS]] for i, start in enumerate(starts)]
    order = [*range(CHAINS)] * STEPS
    rng.shuffle(order)
    copies = []
    for place, chain in enumerate(order):
        step = order[:place].count(chain)
        copies.append(f"{chains[chain][step]} -> {chains[chain][step + 1]}.")
    start, *variables = rng.choice(chains)
    return copies, start, variables


def make(rng: random.Random, size: int) -> Example:
    """Hidden in `size` sentences, behind one solved example."""
    copies, start, variables = assignments(rng)
    shown = f"{' '.join(copies)}\nThe way of {start}: {' -> '.join([start, *variables])}."
    copies, start, variables = assignments(rng)
    text, _ = scatter(rng, copies, filler(rng, size))
    prompt = f"Numbers are copied into variables, and on.\n\n{shown}\n\n{text}\nThe way of {start}: {start} ->"
    return Example(prompt, tuple(variables), 1 / CHAINS)
