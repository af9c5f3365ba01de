"""`export.json`: what an export is made of, for programs."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mha2mla.common.exports import EXPORT_RECORD_NAME
from mha2mla.common.versions import versions

from .check import Agreement
from .config import ExportConfig

PACKAGES = ("mha2mla", "torch", "transformers", "safetensors")


def write_record(
    folder: Path, model: str, options: ExportConfig, details: dict[str, Any], agreement: Agreement, seconds: float
) -> None:
    """Write the record; `details` is what the format has to say."""
    record = {
        "model": model,
        "options": asdict(options),
        **details,
        "agreement": asdict(agreement),
        "seconds": round(seconds, 1),
        "versions": versions(*PACKAGES) | {"python": platform.python_version()},
    }
    (folder / EXPORT_RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
