"""A table, for terminals, markdown and HTML alike."""

import math
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """A markdown table whose columns are aligned, so that it reads well on a terminal too."""
        columns = [max(map(text_width, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.header, ["-" * (width - 1) + ":" for width in columns], *self.rows]
        pad = [
            "| " + " | ".join(" " * (w - text_width(c)) + c for c, w in zip(line, columns, strict=True)) + " |"
            for line in lines
        ]
        return "\n".join([f"{self.title}:", "", *pad])


def text_width(text: str) -> int:
    """Columns on a terminal: marks that combine with a letter take none."""
    return sum(not unicodedata.combining(letter) for letter in text)


def show(value: float | None, stderr: float | None = None, digits: int = 2, factor: float = 1) -> str:
    """A number with its standard error, where there is one."""
    if value is None:
        return "-"
    text = f"{factor * value:,.{digits}f}"
    return text if stderr is None or math.isnan(stderr) else f"{text} ± {factor * stderr:,.{digits}f}"
