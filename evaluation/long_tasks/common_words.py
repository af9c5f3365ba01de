"""`common-words`: the three words of a list that stand in it most often."""

import random

from mha2mla.evaluation.prompts import NOUNS, Example

NAME = "common-words"
COUNT = 3
SHOWN = 12  # words of the solved example


def word_list(rng: random.Random, size: int) -> tuple[str, tuple[str, ...], int]:
    """A list of at least `size` words, half of which are three words; these, and how many different ones it has."""
    common = rng.sample(NOUNS, COUNT)
    rare: list[str] = []
    pool = [noun for noun in NOUNS if noun not in common]
    each = max(2, -(-size // (2 * COUNT)))
    while len(rare) < each * COUNT:  # no other word twice before all have been there
        rare += rng.sample(pool, min(len(pool), each * COUNT - len(rare)))
    words = common * each + rare
    rng.shuffle(words)
    return ", ".join(words), tuple(common), len(set(words))


def make(rng: random.Random, size: int) -> Example:
    """A list of about `size` words, behind one solved example."""
    listed, answers, _ = word_list(rng, SHOWN)
    shown = f"List: {listed}.\nThe {COUNT} words that are repeated most: {', '.join(answers)}."
    listed, answers, different = word_list(rng, size)
    prompt = f"{shown}\n\nList: {listed}.\nThe {COUNT} words that are repeated most:"
    return Example(prompt, answers, COUNT / different)
