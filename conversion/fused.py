"""Checkpoints whose tensors transformers fuses as it loads them: the experts of a layer, which most files hold one by
one. Its own rules for that are applied here to one tensor at a time."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key

from .checkpoint import CheckpointReader


class FusedReader:
    """
    Tensors of a checkpoint by their names in transformers' own class, made when asked for.

    Args:
        reader (`CheckpointReader`): Of the files, which may hold the parts or, as some tools write them, the whole.
        rules (`list`): transformers' own for the model type, see `transformers.conversion_mapping`.
    """

    def __init__(self, reader: CheckpointReader, rules: list[Any]):
        self.reader = reader
        self.folder = reader.folder
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        # Of each tensor its parts, in the order in which they are stacked: the rule's index and pattern, and the name.
        self.parts: dict[str, list[tuple[int, str, str]]] = {}
        self.names_in_file: dict[str, str] = {}  # of what is only renamed
        for name in sorted(reader.files, key=dot_natural_key):
            target = name
            for renaming in self.renamings:
                target, _ = renaming.rename_source_key(target)
            for index, converter in enumerate(self.converters):
                whole, pattern = converter.rename_source_key(target)
                if pattern is not None:
                    self.parts.setdefault(whole, []).append((index, pattern, name))
                    break
            else:
                self.names_in_file[target] = name

    def __contains__(self, name: str) -> bool:
        return name in self.names_in_file or name in self.parts

    def digest(self) -> str:
        """See [`CheckpointReader.digest`]."""
        return self.reader.digest()

    def _fuse(self, name: str, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """The tensor of which these are the parts, in their order."""
        parts = self.parts[name]
        converter = self.converters[parts[0][0]]
        for (_, pattern, part), tensor in zip(parts, tensors, strict=True):
            converter.add_tensor(name, part, pattern, tensor)  # type: ignore[arg-type]  # it takes tensors too
        try:
            (fused,) = converter.convert(name).values()
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{self.folder}: the {len(parts)} parts of {name} ({parts[0][2]}, ...) do not fit together ({error}). "
                "Is the checkpoint complete?"
            ) from None
        return fused

    def get(self, name: str) -> torch.Tensor:
        """One tensor; memory holds its parts beside it for a moment."""
        if name not in self.parts:
            return self.reader.get(self.names_in_file.get(name, name))
        return self._fuse(name, [self.reader.get(part) for _, _, part in self.parts[name]])

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, by the rest of their names."""
        names = [name for name in (*self.names_in_file, *self.parts) if name.startswith(prefix)]
        return {name[len(prefix) :]: self.get(name) for name in names}

    def headers(self) -> dict[str, tuple[list[int], str]]:
        """Shape and type of every tensor, without reading any."""
        found = self.reader.headers()
        headers = {name: found[file] for name, file in self.names_in_file.items()}
        for name, parts in self.parts.items():
            whole = self._fuse(name, (torch.empty(found[part][0], device="meta") for _, _, part in parts))
            headers[name] = (list(whole.shape), found[parts[0][2]][1])
        return headers


def open_checkpoint(folder: Path, config: PreTrainedConfig) -> CheckpointReader | FusedReader:
    """What reads a source's weights under the names of transformers' own class."""
    reader = CheckpointReader(folder)
    rules = get_checkpoint_conversion_mapping(config.model_type)
    return FusedReader(reader, rules) if rules else reader
