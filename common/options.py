"""Checks of options that are dataclass fields, as the command line and the Python API both make them."""

import re
from dataclasses import fields
from os import PathLike, fspath
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

SEEDS = (0, 2**32 - 1)  # that numpy takes
PLAIN = {bool, int, float, str, NoneType}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def as_plain(value: Any) -> Any:
    """A device or type of torch, a path or a number of numpy as what a record in JSON holds; all else as it is."""
    if type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype"):
        return str(value).removeprefix("torch.")
    if isinstance(value, PathLike):
        return fspath(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def settle_types(options: Any) -> None:
    """
    Make plain values of the fields ([`as_plain`]), in place: what is written in Python comes as it is, where the
    command line makes numbers of words.

    Raises:
        ValueError: For a field of plain values that holds another kind. An integer is a float, too.
    """
    hints = get_type_hints(type(options))
    for field in fields(options):
        hint = hints[field.name]
        arguments = set(get_args(hint))
        allowed = set(map(type, arguments)) if get_origin(hint) is Literal else arguments or {hint}
        value = as_plain(getattr(options, field.name))
        object.__setattr__(options, field.name, value)  # of a frozen class, too
        if not allowed <= PLAIN:
            continue
        kinds = tuple(allowed | ({int} if float in allowed else set()))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(sorted(kind.__name__ for kind in allowed - {NoneType}))
            raise ValueError(f"{field.name}={value!r} must be of type {names}, got {type(value).__name__}.")


def check_choices(options: Any) -> None:
    """Raise a `ValueError` for a field that is not among its choices: those of a `Literal`, or, for what is found in a
    folder, the `choices` of its metadata."""
    hints = get_type_hints(type(options))
    for field in fields(options):
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
        choices = field.metadata.get("choices", choices)
        value = getattr(options, field.name)
        left_open = value is None and field.default is None
        if choices and value not in choices and not left_open:
            raise ValueError(f"{field.name}={value!r} must be one of {', '.join(choices)}.")


def check_least(options: Any, **least: float) -> None:
    """Raise a `ValueError` for a field that is given and not at least the value given for its name."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name}={value} must be at least {bound}.")


def check_between(options: Any, **bounds: tuple[float, float]) -> None:
    """Raise a `ValueError` for a field that is given and does not lie between the two values given for its name."""
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}={value} must lie between {least} and {most}.")


def shard_bytes(size: str) -> int:
    """
    Bytes of a size such as "2GB", "500MiB" or "5000".

    Raises:
        ValueError: If it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", size.upper())
    number = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} must be a size above 0, like 2GB, 500MB or 1GiB.")
    return number
