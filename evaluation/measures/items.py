"""Evaluation items: read from files or data sets, checked, and told apart by their fields."""

from pathlib import Path
from typing import Any

from mha2mla.common.files import read_json, read_json_lines
from mha2mla.common.text_sources import TextSource, clean_documents, find_column, is_chat, load_source, reading

Item = dict[str, Any]


def read_items(path: Path, column: str = "text") -> list[Item]:
    """
    Items of a .jsonl file, one object a line, or of a .json file that holds a list of them. Every item has an "id":
    its own, or its place in the file.

    Args:
        column (`str`, *optional*, defaults to `"text"`): What the text of a text item is called in the file.

    Raises:
        ValueError: If the file is not JSON, has no items, or an item is malformed; with the line (or, in a .json
            file, the place) of the first such item.
    """
    if path.suffix == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a .json file must hold a list of items; one object a line is a .jsonl file.")
        numbered = [(f"{path}, item {number}", row) for number, row in enumerate(rows, 1)]
    else:
        numbered = [(f"{path}:{number}", row) for number, row in read_json_lines(path)]
    if not numbered:
        raise ValueError(f"{path} has no items.")
    kinds = {}
    items = []
    for number, (place, row) in enumerate(numbered, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: an item must be a JSON object, got {type(row).__name__}.")
        item = row | {"text": row[column]} if column in row else row
        kinds[place] = item_kind(item, place)
        items.append({"id": str(number)} | item)
    first_place, first_kind = next(iter(kinds.items()))
    for place, kind in kinds.items():
        if kind != first_kind:
            raise ValueError(f"{place}: a {kind} item, but {first_place} is a {first_kind} item; give each a file.")
    return items


def read_texts(source: TextSource, limit: int | None = None) -> list[Item]:
    """
    Text items of any source of text, in the order they lie in; what is empty is left out.

    Args:
        limit (`int`, *optional*): Texts at most.

    Raises:
        ValueError: If the source cannot be read or has no text, or is a data set on the Hub and there is no limit.
    """
    if source.builder is None and limit is None:
        raise ValueError(
            f"--data {source} is a data set on the Hub: say by --limit how many of its texts to measure on."
        )
    texts: list[Any] = []
    column = None
    with reading(source):
        for row in load_source(source, streaming=True):
            if column is None:
                column = find_column(source, list(row))
            texts += clean_documents([row[column]], source, column)
            if len(texts) == limit:
                break
    if not texts:
        raise ValueError(f"{source} has no text.")
    if is_chat(texts[0]):
        raise ValueError(f"{source}: column {column!r} holds messages; perplexity is measured on plain text.")
    return [{"id": str(number), "text": text} for number, text in enumerate(texts, 1)]


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
        if "text" in item:
            raise ValueError(f"{place}: the text must be a string that is not empty, got {item['text']!r:.80}.")
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
