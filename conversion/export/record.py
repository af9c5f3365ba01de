"""`export.json`: what an export is made of, for programs; it also marks a folder as an export's output."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from mha2mla.modeling import MLALlamaConfig

from .check import Agreement
from .config import ExportConfig
from .plan import ExportPlan

EXPORT_RECORD_NAME = "export.json"
PACKAGES = ("mha2mla", "torch", "transformers", "safetensors")


def write_record(
    folder: Path,
    model: str,
    options: ExportConfig,
    config: MLALlamaConfig,
    plan: ExportPlan,
    agreement: Agreement,
    seconds: float,
) -> None:
    slots = {str(frequency): slot for frequency, slot in plan.table.slots.items()}
    record = {
        "model": model,
        "options": asdict(options),
        "cache_width": plan.width,
        "model_cache_width": config.latent_cache_dim,
        # How our family says the same model; the way back takes it from here.
        "source": {
            "head_dim": config.head_dim,
            "rope_parameters": config.rope_parameters,
            "slot_of_frequency": slots,
        },
        "agreement": asdict(agreement),
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    (folder / EXPORT_RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
