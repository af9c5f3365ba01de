"""`common-words`: the word of a list that stands in it most often."""

import random

from mha2mla.evaluation.prompts import NOUNS, Example

NAME = "common-words"
SHOWN = 12  # words of the solved example


def word_list(rng: random.Random, size: int) -> tuple[list[str], str]:
    """At least `size` words, of which half are the same, and that word."""
    common = rng.choice(NOUNS)
    others = [noun for noun in NOUNS if noun != common]
    half = max(2, -(-size // 2))
    words = [common] * half
    while len(words) < 2 * half:  # no other word twice before all have been there
        words += rng.sample(others, min(len(others), 2 * half - len(words)))
    rng.shuffle(words)
    return words, common


def make(rng: random.Random, size: int) -> Example:
    """A list of about `size` words, behind one solved example."""
    words, common = word_list(rng, SHOWN)
    shown = f"Words: {', '.join(words)}.\nThe most repeated word: {common}."
    words, common = word_list(rng, size)
    prompt = f"{shown}\n\nWords: {', '.join(words)}.\nThe most repeated word:"
    return Example(prompt, (common,), 1 / len(set(words)))
