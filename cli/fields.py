"""Fields of dataclasses as options of argparse, as transformers' `HfArgumentParser` makes them: `--help` must not wait
for transformers."""

import json
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


def truth_value(word: str | bool) -> bool:
    """What a flag's word says."""
    if str(word).lower() not in (*TRUE, *FALSE):
        raise ArgumentTypeError(f"must be true or false, got {word}")
    return str(word).lower() in TRUE


def members(hint: Any) -> list[Any]:
    """What an annotation allows beside None."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [kind for kind in allowed if kind is not NoneType]


def choose_from(values: list[Any]) -> dict[str, Any]:
    """argparse's options for one of several values, which need not be strings."""
    by_word = {str(value): value for value in values}
    return dict(choices=values, type=lambda word: by_word.get(word, word))


def reading(hint: Any) -> dict[str, Any]:
    """argparse's options by which a value of this annotation is read; where it allows several kinds, as a string."""
    allowed = members(hint)
    for kind in allowed:
        if isinstance(kind, type) and issubclass(kind, Enum):
            return choose_from([member.value for member in kind])
    if str in allowed:
        return dict(type=str)
    first = allowed[0]
    if first is bool:
        return dict(type=truth_value, nargs="?", const=True)
    if get_origin(first) is Literal:
        return choose_from(list(get_args(first)))
    if get_origin(first) is list:
        return dict(type=get_args(first)[0], nargs="+")
    return dict(type=json.loads if dict in (first, get_origin(first)) else first)


def default_of(field: Field, hint: Any) -> dict[str, Any]:
    factory: Callable[[], Any] | Any = field.default_factory
    if field.default is not MISSING:
        return dict(default=field.default)
    if factory is not MISSING:
        return dict(default=factory())
    return dict(default=False) if hint is bool else dict(required=True)


def add_options(parser: ArgumentParser, dataclass: type) -> None:
    """
    An option for each field, spelt with underscores and with dashes.

    Args:
        parser (`ArgumentParser`): Gets them, in a group if the class has an `_argument_group_name`.
        dataclass (`type`): The metadata of its fields is passed on to `add_argument`: `help`, `choices`, `nargs`; and
            `aliases`, further spellings.
    """
    title, hints = getattr(dataclass, "_argument_group_name", None), get_type_hints(dataclass)
    group = parser if title is None else parser.add_argument_group(title)
    for field in (field for field in fields(dataclass) if field.init):
        hint, metadata = hints[field.name], dict(field.metadata)
        spellings = [f"--{field.name}", f"--{field.name.replace('_', '-')}", *metadata.pop("aliases", [])]
        options = reading(hint) | default_of(field, hint) | metadata
        group.add_argument(*dict.fromkeys(spellings), dest=field.name, **options)
        if field.default is True and hint is bool:
            no = dict.fromkeys((f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"))
            group.add_argument(*no, dest=field.name, action="store_false", help=metadata.get("help"))
