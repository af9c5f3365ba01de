"""Names of a package that are imported when they are first asked for."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    `__getattr__` and `__dir__` (PEP 562) of a package that gives names without importing what holds them: torch and
    transformers take seconds, which `mha2mla COMMAND --help` does without.

    A package says its names to type checkers beside it, under `TYPE_CHECKING`: to them `__getattr__` would say that
    any name is there.

    Args:
        package (`str`): Its `__name__`.
        homes (`Mapping[str, str]`): The module in it, by dots, that holds each name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
