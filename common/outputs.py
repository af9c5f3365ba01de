"""Folders that a command writes whole or not at all, and what of an earlier output it may replace."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from .files import open_weights, read_json_object
from .records import FILES, RECORD_NAME
from .scratch import scratch_folder


def real_path(path: Path) -> Path:
    """Where links lead to, be there anything or not: what is renamed lies on that disk, and the links stay."""
    return Path(os.path.realpath(path))


def files_in(folder: Path) -> list[str]:
    """All that is no folder, relative to it, in order."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def own_files(folder: Path, names: Iterable[str], record: str = RECORD_NAME) -> None:
    """Let a folder's record count these files, too, among what it may replace; one that lists none stays as it is."""
    path = folder / record
    content = read_json_object(path) if path.is_file() else {}
    if isinstance(content.get(FILES), list):
        content[FILES] = sorted({*content[FILES], *names})
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_replaceable(folder: Path, record: str) -> None:
    """Raise a `ValueError` unless `record` lies in a folder and names all files in it. A copy of the record beside
    other weights, as training leaves it, names none."""
    command = Path(record).stem
    if not (folder / record).is_file():
        raise ValueError(
            f"{folder} has no {record}, so it is not an earlier output of the {command}, and --overwrite will not "
            "delete it. Choose another folder, or remove it yourself."
        )
    written = read_json_object(folder / record).get(FILES)
    written = set(map(str, written)) if isinstance(written, list) else set()
    others = [file for file in files_in(folder) if file not in written]
    if others:
        names = shorten(", ".join(dict.fromkeys(file.split("/")[0] for file in others)), 120, placeholder=" ...")
        why = "" if written else f" ({record} lists no files, as in a trained model, or one of an older version)"
        raise ValueError(
            f"{folder} holds what the {command} did not write{why}, and --overwrite will not delete it: {names}. "
            "Choose another folder, or remove it yourself."
        )


def check_output(output: Path, overwrite: bool, record: str = RECORD_NAME) -> None:
    """
    Refuse, before any work is done, an output that must not be touched, or cannot be replaced in the end.

    Args:
        output (`Path`): A folder. It may be empty; with `overwrite`, a run of the same kind may have made it.
        record (`str`): Name of the file that such runs leave in it.

    Raises:
        ValueError: If anything else is there, or the folder cannot be renamed.
    """
    real = real_path(output)
    if not os.path.lexists(real):
        return
    if not real.is_dir() or any(real.iterdir()):
        if not overwrite:
            raise ValueError(f"{output} exists already. Choose another folder, or pass --overwrite to replace it.")
        check_replaceable(output, record)
    if Path.cwd().is_relative_to(real):
        place = "the current folder"
    elif real.is_mount():
        place = "a mount point"
    elif not os.access(real.parent, os.W_OK):
        place = f"in {real.parent}, where you may not write"
    else:
        return
    raise ValueError(
        f"{output} is {place}, so that a complete output cannot take its place. Give a folder in it that is not there "
        f"yet, such as {output / 'model'}."
    )


@contextmanager
def atomic_folder(output: Path, overwrite: bool, record: str = RECORD_NAME) -> Iterator[Path]:
    """
    A new folder beside `output` that takes its name only when the body, which writes `record`, has run to its end.

    A run that fails removes it. A run that is killed leaves it under its temporary name (`.OUTPUT.partial-*`), never
    half a model under the real one, and the next run removes it. With `overwrite`, the old folder stays in place until
    the new one is complete. The record gets the list of all files, by which [`check_output`] knows them again.
    """
    check_output(output, overwrite, record)
    real = real_path(output)
    with scratch_folder(f".{real.name}.partial-", real.parent) as partial:
        yield partial
        open_weights(partial)
        content = read_json_object(partial / record) | {FILES: files_in(partial)}
        (partial / record).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        check_output(output, overwrite, record)
        if real.exists():
            with scratch_folder(f".{real.name}.old-", real.parent) as old:
                os.replace(real, old / real.name)
                os.replace(partial, real)
        else:
            os.replace(partial, real)
