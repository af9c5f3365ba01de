"""Reading and writing safetensors checkpoints tensor by tensor, so that memory does not grow with the model."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mha2mla.common.files import check_readable

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Tables that older versions of transformers saved (Llama 2's checkpoints have them) and every version computes.
COMPUTED = ".rotary_emb.inv_freq"
SAVE_AGAIN = (
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and the same with AutoTokenizer."
)


class TensorSource(Protocol):
    """What weights are read from, by their names in a checkpoint."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str) -> torch.Tensor: ...

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]: ...


class CheckpointReader:
    """
    Tensors of a safetensors checkpoint by name, read when asked for.

    Args:
        folder (`Path`): Holds `model.safetensors`, or shards and `model.safetensors.index.json`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.finite: set[str] = set()  # tensors that have been read and hold no NaN and no infinity
        check_readable(folder)
        if (folder / INDEX_NAME).is_file():
            self.files = read_index(folder / INDEX_NAME)
            missing = sorted({file for file in self.files.values() if not (folder / file).is_file()})
            if missing:
                raise ValueError(f"{folder / INDEX_NAME} names {missing[0]}, which is not there. Download it again.")
            if (folder / WEIGHTS_NAME).is_file() and set(self.files.values()) != {WEIGHTS_NAME}:
                raise ValueError(
                    f"{folder} holds {WEIGHTS_NAME}, which transformers loads, and {INDEX_NAME}, which names other "
                    "files. Remove what does not belong to the model."
                )
        elif (folder / WEIGHTS_NAME).is_file():
            with self._open(WEIGHTS_NAME) as file:
                self.files = dict.fromkeys(file.keys(), WEIGHTS_NAME)
        elif any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise ValueError(
                f"{folder} holds pickled weights only, which can run code when loaded. Save it as safetensors first: "
                + SAVE_AGAIN
            )
        else:
            raise ValueError(f"No {WEIGHTS_NAME} or {INDEX_NAME} in {folder}.")
        self.files = {name: file for name, file in self.files.items() if not name.endswith(COMPUTED)}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        """One of the files, mapped; a `ValueError` if it is damaged or does not hold what the index says."""
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                yield opened
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file} cannot be read ({error}): download it again.") from None

    def headers(self) -> dict[str, tuple[list[int], str]]:
        """Shape and type of every tensor ("F32", "BF16", ...), without reading any."""
        found = {}
        for file in sorted(set(self.files.values())):
            with self._open(file) as opened:
                for name in (name for name, place in self.files.items() if place == file):
                    tensor = opened.get_slice(name)
                    found[name] = (tensor.get_shape(), tensor.get_dtype())
        return found

    def get(self, name: str) -> torch.Tensor:
        """
        One tensor. Its file is mapped only as long as the tensor lives.

        Raises:
            ValueError: If it is not there, or holds NaN or infinity.
        """
        if name not in self.files:
            raise ValueError(f"{self.folder} has no tensor {name!r}; is the checkpoint complete?")
        with self._open(self.files[name]) as file:
            tensor = file.get_tensor(name)
        if name not in self.finite:
            check_finite(name, tensor, f"{self.folder / self.files[name]} is damaged, or training diverged.")
            self.finite.add(name)
        return tensor

    def digest(self) -> str:
        """What tells these weights from others, for the price of reading them."""
        found = hashlib.sha256()
        for file in sorted(set(self.files.values())):
            with self._open(file) as opened:
                for name in sorted(name for name, place in self.files.items() if place == file):
                    tensor = opened.get_tensor(name)
                    found.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
                    found.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names that start with it."""
        return [name[len(prefix) :] for name in self.files if name.startswith(prefix)]

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, by the rest of their names."""
        return {name: self.get(prefix + name) for name in self.names(prefix)}


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, all of them beside the index."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
            raise ValueError("it names a file outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files ({error!r}): download it again.") from None
    return files


def check_finite(name: str, tensor: torch.Tensor, cause: str) -> None:
    """Raise a `ValueError` if a tensor holds NaN or infinity."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity: {cause}")


class CheckpointWriter:
    """
    Writes shards of at most `max_shard_bytes` as tensors come in; holds one shard in memory.

    Args:
        folder (`Path`): Where the shards and their index go.
        max_shard_bytes (`int`): A single larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, max_shard_bytes: int):
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0
        self.total_parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        check_finite(name, tensor, f"{tensor.dtype} cannot hold its values. Choose --dtype bfloat16 or float32.")
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += size
        self.total_bytes += size
        if tensor.is_floating_point():
            self.total_parameters += tensor.numel()

    def _shard_name(self, index: int) -> str:
        return f"model-part-{index:05d}.safetensors"

    def _flush(self) -> None:
        save_file(self.pending, self.folder / self._shard_name(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}
        self.pending_bytes = 0

    def finish(self) -> None:
        """Write what is left, give the shards their final names and write the index."""
        self._flush()
        count = len(self.shards)
        if count == 1:
            (self.folder / self._shard_name(0)).rename(self.folder / WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self.shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / self._shard_name(index)).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        metadata = {"total_size": self.total_bytes, "total_parameters": self.total_parameters}
        index_text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (self.folder / INDEX_NAME).write_text(index_text + "\n")
