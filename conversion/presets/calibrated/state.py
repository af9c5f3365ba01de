"""Statistics of calibration text on disk: one file a layer, so that memory does not grow with the model, and one pass
over the text serves several sizes of cache."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from mha2mla.common.files import damage, open_weights, read_json_object
from mha2mla.common.scratch import scratch_folder

from .closed_form import LayerStatistics
from .pair_scores import PairMoments

FINGERPRINT_NAME = "calibration.json"
LOCK_NAME = ".lock"
SCRATCH = ".partial-"  # what files are named by until they are whole; several conversions may share a folder
UNRELATED = ("transformers_version", "_name_or_path")  # fields of a config that change nothing


def fingerprint(
    config: PreTrainedConfig, weights: str, blocks: torch.Tensor, num_score_blocks: int, shared_key: bool
) -> dict:
    """What statistics depend on: not on where the model lies, which a .gguf does elsewhere each time. `weights` is
    their [`digest`]."""
    described = {key: value for key, value in config.to_dict().items() if key not in UNRELATED}
    return {
        "config": hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights,
        "text": hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),
        "num_score_blocks": num_score_blocks,
        "shared_key": shared_key,
    }


class CalibrationState:
    """
    A folder of layer statistics.

    Args:
        folder (`Path`): Made if missing.
        identity (`dict`): From [`fingerprint`]; a folder made with another one is refused.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / FINGERPRINT_NAME
        if not mark.is_file():
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise ValueError(f"{folder} is not a calibration state (no {FINGERPRINT_NAME}). Give another folder.")
            with FileLock(folder / LOCK_NAME):  # of two that begin at a time, the second finds the first's
                if not mark.is_file():
                    with self._whole(mark) as partial:
                        partial.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        there = read_json_object(mark)
        differing = [key for key, value in identity.items() if there.get(key) != value]
        if differing:
            raise ValueError(
                f"The calibration state in {folder} was made with other values of: {', '.join(differing)}. Give "
                "the model and options it was made with, or another folder."
            )

    @contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        """A file of the folder, to be written under another name until it is whole."""
        with scratch_folder(SCRATCH, self.folder) as scratch:
            yield scratch / path.name
            open_weights(scratch)
            os.replace(scratch / path.name, path)

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def __contains__(self, index: int) -> bool:
        path = self._path(index)
        if path.is_file() and (fault := damage(path)):
            raise ValueError(f"{fault}. Remove it, and this layer is measured again.")
        return path.is_file()

    def save(self, index: int, statistics: LayerStatistics) -> None:
        # The largest tensor by far; summed in fp64, but fp32 is finer than its shrinkage.
        tensors = {"latent_covariance": statistics.latent_covariance.float(), "query_power": statistics.query_power}
        tensors |= {"mix": statistics.mix, "unmix": statistics.unmix}
        tensors |= {f"moments.{f.name}": getattr(statistics.moments, f.name) for f in fields(PairMoments)}
        # safetensors has no complex128: a pair of reals at the end.
        stored = {n: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for n, t in tensors.items()}
        with self._whole(self._path(index)) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in stored.items()}, partial)

    def load(self, index: int, device: str) -> LayerStatistics:
        # Cloned: a tensor mapped from the file lies at any address, and complex arithmetic crashes on unaligned ones.
        tensors = {name: tensor.clone() for name, tensor in load_file(self._path(index), device=device).items()}
        real = ("latent_covariance", "query_power", "moments.s0")
        restored = {n: t if n in real else torch.view_as_complex(t) for n, t in tensors.items()}
        moments = PairMoments(*(restored[f"moments.{f.name}"] for f in fields(PairMoments)))
        return LayerStatistics(
            restored["latent_covariance"].double(),
            restored["query_power"],
            restored["mix"],
            restored["unmix"],
            moments,
        )
