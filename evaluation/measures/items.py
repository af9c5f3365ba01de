"""Evaluation items from local JSON Lines files: read, checked, and told apart by their fields."""

import json
from pathlib import Path
from typing import Any

Item = dict[str, Any]


def read_items(path: Path) -> list[Item]:
    """
    Items of a .jsonl file, one object a line, or of a .json file that holds a list of them. Every item has an "id":
    its own, or its place in the file.

    Raises:
        ValueError: If the file is not JSON, has no items, or an item is malformed; with the line (or, in a .json
            file, the place) of the first such item.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}).") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a .json file must hold a list of items; one object a line is a .jsonl file.")
        numbered = [(f"{path}, item {number}", row) for number, row in enumerate(rows, 1)]
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028
            if line.strip():
                try:
                    numbered.append((f"{path}:{number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error.msg}).") from None
    if not numbered:
        raise ValueError(f"{path} has no items.")
    kinds = {}
    for place, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: an item must be a JSON object, got {type(row).__name__}.")
        kinds[place] = item_kind(row, place)
    first_place, first_kind = next(iter(kinds.items()))
    for place, kind in kinds.items():
        if kind != first_kind:
            raise ValueError(f"{place}: a {kind} item, but {first_place} is a {first_kind} item; give each a file.")
    return [{"id": str(number)} | row for number, (_, row) in enumerate(numbered, 1)]


def item_kind(item: Item, place: str) -> str:
    """
    What can be measured on an item, by its fields: "completion" (`context` and `target`; long-context retrieval has
    `length` and `depth` as well), "choice" (`context`, `choices`, `answer`), or "text" (`text`).

    Args:
        place (`str`): File and line, for the message.

    Raises:
        ValueError: If it is none of these, or a field has the wrong form.
    """
    if "context" not in item:
        if isinstance(item.get("text"), str) and item["text"]:
            return "text"
        raise ValueError(
            f"{place}: an item needs `text`, or `context` with `choices` and `answer`, or `context` with `target`; "
            f"this one has {', '.join(item) or 'nothing'}."
        )
    if not isinstance(item["context"], str):
        raise ValueError(f"{place}: `context` must be a string, got {item['context']!r}.")
    if "target" in item:
        if not isinstance(item["target"], str) or not item["target"].strip():
            raise ValueError(f"{place}: `target` must be a string that is not empty, got {item['target']!r}.")
        grid = [name for name in ("length", "depth") if name in item]
        if len(grid) == 1 or not all(isinstance(item[name], int | float) for name in grid):
            raise ValueError(f"{place}: `length` and `depth` must be two numbers, or both be left out.")
        return "completion"
    check_choices(item, place)
    return "choice"


def check_choices(item: Item, place: str) -> None:
    """A `ValueError` that names the place unless the item has at least two choices and an index of one of them."""
    choices, answer = item.get("choices"), item.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{place}: `choices` must be a list of at least two strings, got {choices!r}.")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{place}: every choice must be a string that is not empty, got {choice!r}.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"{place}: `answer` must be the index of a choice, 0 to {len(choices) - 1}, got {answer!r}.")
