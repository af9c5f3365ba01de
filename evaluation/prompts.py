"""What the generated tasks of long context are made of: words, sentences that say nothing, and the right length."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NOUNS = (
    "anchor apple arrow barrel basket beacon bottle bridge bucket butter button candle carpet castle cherry circle "
    "copper cotton curtain desert dragon engine feather finger flower forest garden guitar hammer harbor helmet "
    "island jacket kettle kitchen ladder lantern lemon letter marble meadow mirror mountain needle ocean orange "
    "parcel pencil pepper pillow planet pocket pony rabbit ribbon river saddle sailor shadow silver spider stable "
    "summer table temple thunder ticket timber tower tunnel turtle valley velvet violin wagon walnut water whistle "
    "window winter wizard wolf yard"
).split()
FIRST_NAMES = (
    "Ada Alma Anton Arthur Bruno Carl Celia Clara Dora Edgar Edith Elsa Emil Felix Flora Frank George Gloria Greta "
    "Harold Helen Henry Hugo Ida Irene Ivan Jacob Julia Karl Laura Leo Lydia Martin Mary Nora Oscar Paul Rosa Simon "
    "Victor"
).split()
TOWNS = (
    "Ashford Barnwell Clifton Dunmore Eastbrook Fairview Glenwood Hartley Kingsbury Lakeside Milton Northgate Oakdale "
    "Pinehurst Riverton Stonebridge"
).split()
TRADES = "baker farmer teacher sailor tailor doctor painter gardener carpenter miller singer postman".split()
COLORS = "red blue green yellow white black brown purple".split()

_WHO = "the baker|an old farmer|the teacher|a young sailor|the gardener|my neighbor|the shopkeeper|a traveler"
_DOES = (
    "walked slowly|waited for a while|talked with a friend|looked for a seat|sang an old song|rested|drank some tea|"
    "read the newspaper|fed the birds|counted the clouds"
)
_WHERE = "near the river|in the market|behind the house|by the church|on the hill|at the station|under a tree"
_WHEN = "in the morning|after lunch|before the rain|on Sunday|in the evening|last week|at noon|as always"


@dataclass(frozen=True)
class Example:
    """
    Attributes:
        prompt (`str`): Text, to be continued with the answers.
        answers (`tuple[str, ...]`): Words of which the first line of the continuation shall consist, in any order.
        chance (`float`): The score of someone who names words of the right form from the text, without reading it.
        depth (`float`, *optional*): Where in the text the answer stands, from 0 (beginning) to 1.
    """

    prompt: str
    answers: tuple[str, ...]
    chance: float
    depth: float | None = None


# Makes an example of a size, in units of its own of which a prompt's length is about a linear function.
Maker = Callable[[random.Random, int], Example]


def filler(rng: random.Random, count: int) -> list[str]:
    """Sentences in which nothing is asked for."""
    choices = [part.split("|") for part in (_WHO, _DOES, _WHERE, _WHEN)]
    drawn = [" ".join(rng.choice(words) for words in choices) for _ in range(count)]
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in drawn]


def scatter(rng: random.Random, sentences: Sequence[str], among: Sequence[str]) -> tuple[str, list[float]]:
    """
    Put sentences into a text, in their order, at random places.

    Returns:
        The text, and where each of them stands, from 0 to 1.
    """
    places = sorted(rng.randint(0, len(among)) for _ in sentences)
    parts = list(among)
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        parts.insert(place, sentence)
    return " ".join(parts), [place / max(1, len(among)) for place in places]


def fit_length(make: Maker, seed: str, length: int, count_tokens: Callable[[Example], int]) -> Example:
    """
    The example of a seed with as many tokens as asked, or a few less.

    Args:
        count_tokens (`Callable`): Tokens of an example, those that its answers may take included.

    Raises:
        ValueError: If even the smallest example is longer.
    """

    size, fits = 1, make(random.Random(seed), 1)
    tokens, most = count_tokens(fits), length
    if tokens > length:
        raise ValueError(f"The smallest prompt of this task has {tokens} tokens: {length} are too few.")
    # What stands around the units makes the estimate a little low, so that the length is approached from below.
    while step := min(most, (length - tokens) * size // tokens):
        example = make(random.Random(seed), size + step)
        count = count_tokens(example)
        if count <= length:
            size, fits, tokens = size + step, example, count
        else:
            most = step // 2
    return fits
