"""Convert pretrained transformers to Multi-head Latent Attention (MLA), train them further and serve them."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "ConversionConfig",
    "ExportConfig",
    "MLALlamaConfig",
    "MLALlamaForCausalLM",
    "MLALlamaModel",
    "__version__",
    "convert",
    "export",
]

# Where each name lives; imported when it is first asked for, as torch and transformers take seconds.
_HOMES = {
    "ConversionConfig": "conversion",
    "convert": "conversion",
    "ExportConfig": "conversion.export",
    "export": "conversion.export",
    "MLALlamaConfig": "modeling",
    "MLALlamaForCausalLM": "modeling",
    "MLALlamaModel": "modeling",
}

if TYPE_CHECKING:
    from .conversion import ConversionConfig, convert
    from .conversion.export import ExportConfig, export
    from .modeling import MLALlamaConfig, MLALlamaForCausalLM, MLALlamaModel
else:  # hidden from type checkers, to which it would say that any name is there

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
