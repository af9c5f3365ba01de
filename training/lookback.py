"""Rows in which text comes back, so that looking up is trained.

In prose a distant passage is hardly ever needed to predict the next token, and a model that was trained on prose alone
loses the finding of it long before its loss tells. Where passages return word by word, nearly every token of them
depends on finding the place that they were taken from.
"""

from collections.abc import Sequence

import numpy as np

SHORTEST, LONGEST = 8, 40  # tokens of a passage that returns
SPACING = 2 * (SHORTEST + LONGEST)  # one passage for so many tokens: a quarter of a document is text come back
SCRAMBLED = 3  # the tokens of every third passage stand in an order that no text has: found again, or not predicted
HALVINGS = 4  # a document is as long as its row, or a half, a quarter, an eighth of it


def lookback_document(ids: Sequence[int], rng: np.random.Generator) -> list[int]:
    """
    A document as long as the given one: its beginning, and then, in any order, passages out of that.

    One passage comes out of each stretch of the text, so that all distances occur. Every third is scrambled, where it
    stands first as where it returns.

    Args:
        ids (`Sequence[int]`): Token ids of the text; of less than 96 none returns.
        rng (`numpy.random.Generator`): What is drawn with.
    """
    count = len(ids) // SPACING
    if count == 0:
        return list(ids)
    sizes = rng.integers(SHORTEST, LONGEST + 1, count)
    text = np.array(ids[: len(ids) - sizes.sum()])
    stretch = len(text) // count  # at least SPACING - LONGEST, so that every passage fits
    places = [
        slice(begin, begin + size)
        for begin, size in zip(np.arange(count) * stretch + rng.integers(0, stretch - sizes + 1), sizes, strict=True)
    ]
    for place in places[::SCRAMBLED]:
        text[place] = rng.choice(text, place.stop - place.start)
    return np.concatenate([text, *(text[places[which]] for which in rng.permutation(count))]).tolist()


def add_lookback(rows: dict[str, list[list[int]]], share: float, seed: int, first_row: int = 0) -> None:
    """
    Make a share of packed rows into rows that look back, evenly spread: their documents become one, or two, four or
    eight of equal length.

    Args:
        rows (`dict[str, list[list[int]]]`): `input_ids` and `lengths`, as [`pack_documents`] gives them; changed.
        share (`float`): Of the rows, from 0 to 1.
        seed (`int`): What is drawn with, beside the row's own tokens.
        first_row (`int`): Number of the first one, as of which they are spread.
    """
    for index, ids in enumerate(rows["input_ids"]):
        number = first_row + index
        if int((number + 1) * share) == int(number * share):
            continue
        rng = np.random.default_rng([seed, *ids])
        size = -(-len(ids) // 2 ** int(rng.integers(HALVINGS)))
        pieces = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
        documents = [lookback_document(piece, rng) for piece in pieces]
        rows["input_ids"][index] = [token for document in documents for token in document]
        rows["lengths"][index] = [len(document) for document in documents]
