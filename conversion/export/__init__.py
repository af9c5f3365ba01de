"""Writing our models in forms that serving engines run with their own code."""

from typing import TYPE_CHECKING

from mha2mla.common.lazy import lazy_names

if TYPE_CHECKING:
    from .config import ExportConfig as ExportConfig
    from .run import export as export
else:
    __getattr__, __dir__ = lazy_names(__name__, {"ExportConfig": "config", "export": "run"})
