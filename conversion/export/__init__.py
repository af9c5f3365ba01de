"""Writing our models in forms that serving engines run with their own code."""

from .config import ExportConfig
from .export import export

__all__ = ["ExportConfig", "export"]
