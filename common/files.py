"""Small files of values that people write by hand or another run left: YAML and JSON, with errors that say where."""

import gzip
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a surrogate pair: Python's strings hold it, UTF-8 cannot


class YamlLoader(yaml.SafeLoader):
    """PyYAML's, to which 1e-4 is text: YAML 1.1 wants a point in it, and nothing else that reads numbers does."""


YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]\d+$"), [*"-+0123456789"])


def no_file(path: str | Path) -> str:
    """For a person: that there is none, and the name beside it that is most like it."""
    path = Path(path)
    near = get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1, cutoff=0.85)
    return f"There is no file {path}. " + (f"Did you mean {path.parent / near[0]}?" if near else "Check the path.")


def shown(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds, in order, less what is hidden: beside each file macOS puts its `._NAME` on many disks."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def open_weights(folder: Path) -> None:
    """Give files of weights the mode of any new file. safetensors 0.8 leaves them to their owner alone, and another
    user's server could not read them (safetensors issue 782)."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        if path.stat().st_mode != mode:  # a disk without modes refuses to change them
            path.chmod(mode)


def check_readable(folder: Path) -> None:
    """Raise a `ValueError` for a file of a checkpoint that may not be read: libraries say that it is not there. A
    folder that there is not, as of a name on the Hub, has none."""
    for path in (path for pattern in ("*.safetensors", "*.json") for path in sorted(folder.glob(pattern))):
        if path.exists() and not os.access(path, os.R_OK):
            raise ValueError(f"{path} may not be read by you. Change its permissions, for example by `chmod u+r`.")


def damage(path: Path) -> str | None:
    """For a person: what tells that a file of tensors or JSON is not whole; None if nothing does. Of tensors only what
    says how many there are is read."""
    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path} cannot be read (its end is missing)"
    except SafetensorError as error:
        return f"{path} cannot be read ({error})"
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def check_output_file(path: Path) -> None:
    """Make the folder of a file of results, or raise a `ValueError`: now, not when the first numbers are there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path.parent} cannot be a folder of results ({error}). Choose another --output.") from None
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(f"{path} cannot be written. Choose another --output.")
    weights = [*shown(path.parent, "*.safetensors"), *shown(path.parent, "pytorch_model*.bin")]
    if weights and shown(path.parent, "*config.json"):  # either alone may be of anything; an adapter has a config, too
        raise ValueError(
            f"{path.parent} holds a model: results would go up with it, and no --overwrite would replace it any more. "
            "Choose another --output."
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def read_text(path: Path) -> str:
    """
    The content of a text file.

    Raises:
        ValueError: If there is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(no_file(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read. Save it as UTF-8.") from None


def read_yaml(path: Path) -> Any:
    """
    The content of a YAML file.

    Raises:
        ValueError: If it cannot be read; with the line, where it is malformed.
    """
    try:
        return yaml.load(read_text(path), YamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path if mark is None else f"{path}:{mark.line + 1}"
        raise ValueError(f"{place} is not YAML: {getattr(error, 'problem', None) or error}.") from None


def read_json(path: Path) -> Any:
    """
    The content of a JSON file.

    Raises:
        ValueError: If it cannot be read; with the line, where it is malformed.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} is not JSON: {error.msg}.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; a `ValueError` as [`read_json`], or if it holds another thing."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """
    The lines of a text file, compressed by gzip or not, with their numbers from 1.

    Raises:
        ValueError: At a line that is not UTF-8, or where the file cannot be read further; with the line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}:{number} is not UTF-8 text. Save the file as UTF-8.") from None
    except FileNotFoundError:
        raise ValueError(no_file(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read after line {number} ({error}). Is it complete?") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """
    What the lines of a .jsonl file hold, with their numbers; empty lines are passed over.

    Raises:
        ValueError: As [`read_lines`], and at a line that is not JSON or escapes half a character, which Python takes
            and neither `datasets` nor tokenizers do.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error.msg}.") from None
        half = "\\u" in line and HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False))
        if half:
            raise ValueError(
                f"{path}:{number} holds \\u{ord(half[0]):x}, which is half of a surrogate pair and no character. "
                "Remove it."
            )
        yield number, row
