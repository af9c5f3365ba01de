"""Conversion of pretrained checkpoints to Multi-head Latent Attention."""

from typing import TYPE_CHECKING

from mha2mla.common.lazy import lazy_names

if TYPE_CHECKING:
    from .cache_plan import CachePlan as CachePlan
    from .config import ConversionConfig as ConversionConfig
    from .presets.calibrated import Calibrated as Calibrated
    from .presets.paper import Paper as Paper
    from .run import convert as convert
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "CachePlan": "cache_plan",
            "Calibrated": "presets.calibrated",
            "ConversionConfig": "config",
            "Paper": "presets.paper",
            "convert": "run",
        },
    )
