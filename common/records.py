"""The record that a conversion leaves beside the weights: what it takes to repeat it, and what it measured."""

import shutil
from pathlib import Path
from typing import Any

from .files import read_json_object
from .loading import find_file

RECORD_NAME = "conversion.json"  # marks a folder as an output of the conversion


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
    converted."""
    path = find_file(str(checkpoint), RECORD_NAME)
    if path is not None:
        shutil.copyfile(path, folder / RECORD_NAME)
