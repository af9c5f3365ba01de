"""Writing our models in forms that serving engines run with their own code."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {"ExportConfig": "config", "export": "run"}  # where each name lives; imported when it is first asked for

if TYPE_CHECKING:
    from .config import ExportConfig as ExportConfig
    from .run import export as export
else:  # hidden from type checkers, to which it would say that any name is there

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
