"""The type of the weights that a run leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mha2mla.common.files import read_json_object


def restore_dtype(folder: Path, dtype: torch.dtype | None) -> None:
    """
    Bring what a run saved in float32 back to the 16 bits of the model that it began with, a file at a time.

    Training wants float32, and what it saves would be twice the model's size, with twice its cache. Where this is
    interrupted, the folder loads all the same.

    Args:
        folder (`Path`): Holds safetensors files and a config.
        dtype (`torch.dtype`, *optional*): Of the model before training. Anything but 16 bits leaves all as it is.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return
    total_size, changed = 0, False
    for file in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(file)
        wide = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.dtype == torch.float32}
        tensors |= wide
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        if wide:
            changed = True
            partial = file.with_name(f".{file.name}.partial")
            save_file(tensors, partial, {"format": "pt"})
            partial.replace(file)
    if not changed:  # trained in 16 bits
        return
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        content = read_json_object(index)
        write_json(index, content | {"metadata": content["metadata"] | {"total_size": total_size}})
    config = folder / "config.json"
    write_json(config, read_json_object(config) | {"dtype": str(dtype).removeprefix("torch.")})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
