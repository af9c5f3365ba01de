"""Texts that grow beside one another on a terminal."""

import unicodedata
from collections.abc import Sequence
from itertools import zip_longest
from typing import TextIO

BETWEEN = " │ "
LEAST_WIDTH = 30  # of a column that can be read


def letter_width(letter: str) -> int:
    """Cells of a terminal."""
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def width_of(text: str) -> int:
    return sum(map(letter_width, text))


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces, and inside of words that are longer. Of a text that grows, all
    lines but the last stay as they are."""
    lines = []
    for paragraph in text.split("\n"):
        line: str | None = None
        for word in paragraph.split(" "):
            joined = word if line is None else f"{line} {word}"
            if width_of(joined) > width and line and not line.isspace():
                lines.append(line)
                joined = word
            line = ""
            for letter in joined:
                if width_of(line) + letter_width(letter) > width:
                    lines.append(line)
                    line = ""
                line += letter
        lines.append(line or "")
    return lines


class Columns:
    """
    Columns that are drawn again and again; lines that cannot change any more are left alone, so that a text may be
    longer than the screen.

    Args:
        out (`TextIO`): A terminal.
        count (`int`): Columns.
        width, height (`int`): Of the terminal.
    """

    def __init__(self, out: TextIO, count: int, width: int, height: int):
        self.out, self.height = out, height
        self.width = (width - len(BETWEEN) * (count - 1)) // count
        self.first = 0  # line that may still change
        self.open = 0  # lines on the screen that will be drawn again

    def row(self, cells: Sequence[str]) -> str:
        padded = [cell + " " * (self.width - width_of(cell)) for cell in cells]
        return BETWEEN.join(padded).rstrip()

    def draw(self, texts: Sequence[str], footers: Sequence[str]) -> None:
        """The texts as they are now, and a line below each of them."""
        columns = [wrap(text, self.width) for text in texts]
        count = max(map(len, columns))
        rows = list(zip_longest(*(column[self.first :] for column in columns), fillvalue=""))
        back = f"\x1b[{self.open}A\x1b[J" if self.open else ""
        feet = [wrap(footer, self.width)[0] for footer in footers]
        self.out.write(back + "".join(f"{self.row(cells)}\n" for cells in [*rows, feet]))
        self.out.flush()
        self.first = max(min(map(len, columns)) - 1, count - (self.height - 2), self.first)
        self.open = count - self.first + 1
