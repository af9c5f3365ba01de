"""The record that a conversion leaves beside the weights: what it takes to repeat it, and what it measured."""

import json
import shutil
from pathlib import Path
from typing import Any

from .files import read_json_object
from .loading import find_file

RECORD_NAME = "conversion.json"  # marks a folder as an output of the conversion, together with FILES
FILES = "files"  # in a record: what a command wrote, which is all that it may replace


def read_record(checkpoint: str | Path) -> dict[str, Any]:
    """
    The record of a checkpoint.

    Args:
        checkpoint (`str` or `Path`): A folder, or OWNER/NAME on the Hub.

    Raises:
        ValueError: If there is none, or it is malformed.
    """
    path = find_file(str(checkpoint), RECORD_NAME)
    if path is None:
        raise ValueError(f"{checkpoint} has no {RECORD_NAME}: give a folder that `mha2mla convert` wrote.")
    return read_json_object(path)


def recorded_preset(checkpoint: str | Path) -> str | None:
    """The preset that a checkpoint was converted with; None where there is no record of it."""
    path = find_file(str(checkpoint), RECORD_NAME)
    if path is None:
        return None
    try:
        return str(read_json_object(path)["options"]["preset"])
    except (KeyError, TypeError):
        raise ValueError(f"{path} has no `options` with a `preset`: it is no record of `mha2mla convert`.") from None


def copy_record(checkpoint: str | Path, folder: Path) -> None:
    """Take the record of a checkpoint along, if it has one, so that what is made of it still tells how it was
    converted. The list of files stays behind: those in `folder` are not the conversion's, and it must not replace
    them."""
    path = find_file(str(checkpoint), RECORD_NAME)
    if path is None:
        return
    try:
        record = read_json_object(path)
    except ValueError:  # malformed, which is no reason to lose what was made
        shutil.copyfile(path, folder / RECORD_NAME)
        return
    record.pop(FILES, None)
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
