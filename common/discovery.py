"""What lies in a package's folder is found by itself: adding a file is all there is to do, nothing is registered."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TypeVar

Base = TypeVar("Base")


def submodules(package: str, path: Iterable[str]) -> list[ModuleType]:
    """The modules and packages in the folder of `package` (its `__name__` and `__path__`), imported."""
    return [import_module(f"{package}.{info.name}") for info in iter_modules(path)]


class NamedModules(Mapping[str, ModuleType]):
    """The same by their `NAME`, which users write, in alphabetical order. Names are read in the files, and a module is
    imported when it is asked for: `--help` must not wait for torch."""

    def __init__(self, package: str, path: Iterable[str]):
        modules = [f"{package}.{info.name}" for info in iter_modules(path)]
        self.modules = dict(sorted((written_name(module), module) for module in modules))

    def __getitem__(self, name: str) -> ModuleType:
        return import_module(self.modules[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def written_name(module: str) -> str:
    """The `NAME` in the file of a module that need not be imported; its package is."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAME":
            return str(ast.literal_eval(node.value))
    raise AttributeError(f"{spec.origin} has no NAME.")


def defined_classes(package: str, path: Iterable[str], base: type[Base]) -> list[type[Base]]:
    """The subclasses of `base` that these modules define, themselves or, for a package, in one of its modules."""
    found = []
    for module in submodules(package, path):
        for value in vars(module).values():
            subclass = isinstance(value, type) and issubclass(value, base) and value is not base
            if subclass and f"{value.__module__}.".startswith(f"{module.__name__}."):
                found.append(value)
    return found
