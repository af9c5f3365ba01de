"""Conversion of pretrained checkpoints to Multi-head Latent Attention."""

from importlib import import_module
from typing import TYPE_CHECKING

# Where each name lives; imported when it is first asked for, so that `mha2mla convert --help` does without torch.
_HOMES = {
    "CachePlan": "cache_plan",
    "Calibrated": "presets.calibrated",
    "ConversionConfig": "config",
    "Paper": "presets.paper",
    "convert": "run",
}

if TYPE_CHECKING:
    from .cache_plan import CachePlan as CachePlan
    from .config import ConversionConfig as ConversionConfig
    from .presets.calibrated import Calibrated as Calibrated
    from .presets.paper import Paper as Paper
    from .run import convert as convert
else:  # hidden from type checkers, to which it would say that any name is there

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
