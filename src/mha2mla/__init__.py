"""Convert pretrained transformers to Multi-head Latent Attention (MLA), train them further and serve them."""

from typing import TYPE_CHECKING

from .common.lazy import lazy_names

__version__ = "0.1.0"
__all__ = [
    "Calibrated",
    "ConversionConfig",
    "ExportConfig",
    "MLALlamaConfig",
    "MLALlamaForCausalLM",
    "MLALlamaModel",
    "Paper",
    "__version__",
    "convert",
    "export",
]

if TYPE_CHECKING:
    from .conversion import Calibrated, ConversionConfig, Paper, convert
    from .conversion.export import ExportConfig, export
    from .modeling import MLALlamaConfig, MLALlamaForCausalLM, MLALlamaModel
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Calibrated": "conversion",
            "ConversionConfig": "conversion",
            "Paper": "conversion",
            "convert": "conversion",
            "ExportConfig": "conversion.export",
            "export": "conversion.export",
            "MLALlamaConfig": "modeling",
            "MLALlamaForCausalLM": "modeling",
            "MLALlamaModel": "modeling",
        },
    )
