"""YAML files that users write: arguments of a command, recipes of data."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """
    The content of a YAML file.

    Raises:
        ValueError: If the file is not there or malformed; the message says where.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
