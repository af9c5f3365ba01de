"""What lies in a package's folder is found by itself: adding a file is all there is to do, nothing is registered."""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TypeVar

Base = TypeVar("Base")


def submodules(package: str, path: Iterable[str]) -> list[ModuleType]:
    """The modules and packages in the folder of `package` (its `__name__` and `__path__`), imported."""
    return [import_module(f"{package}.{info.name}") for info in iter_modules(path)]


def named_modules(package: str, path: Iterable[str]) -> dict[str, ModuleType]:
    """The same by their `NAME`, which users write, in alphabetical order."""
    return dict(sorted((module.NAME, module) for module in submodules(package, path)))


def defined_classes(package: str, path: Iterable[str], base: type[Base]) -> list[type[Base]]:
    """The subclasses of `base` that these modules define, themselves or, for a package, in one of its modules."""
    found = []
    for module in submodules(package, path):
        for value in vars(module).values():
            subclass = isinstance(value, type) and issubclass(value, base) and value is not base
            if subclass and f"{value.__module__}.".startswith(f"{module.__name__}."):
                found.append(value)
    return found
