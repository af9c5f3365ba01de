"""A checkpoint's weights against its config, from the headers of its files: before anything long starts."""

import math
from collections import Counter
from collections.abc import Collection, Container, Iterable
from pathlib import Path
from textwrap import shorten

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .architectures.base import HEAD
from .checkpoint import SAVE_AGAIN, CheckpointReader
from .fused import FusedReader

BASE_PREFIX = "model."
CLASSIFIER = "score."  # the head of transformers' classes for classification
# As safetensors names them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def expected_tensors(config: PreTrainedConfig) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor that a model of the config saves, by name and without memory, and of those that may be missing the
    name of the tensor that they are tied to."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a malformed config makes of transformers and torch
        reason = shorten(str(error), 300, placeholder=" ...")
        raise ValueError(f"There is no model of such a config.json ({reason}). Mend it.") from error
    return model.state_dict(), dict(model.all_tied_weights_keys)


def check_weights(reader: CheckpointReader | FusedReader, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: For the first tensor that is missing, that the config does not ask for, or that has another shape
            or type than it must, with what to do.
    """
    expected, tied = expected_tensors(config)
    found = reader.headers()
    check_class(reader.folder, expected, tied, found)
    missing = [name for name in expected if name not in found and name not in tied]
    if missing:
        raise ValueError(
            f"{reader.folder} lacks {missing[0]}{more(missing)}, which its config.json asks for. Is the checkpoint "
            "complete, and is it the config's?"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise ValueError(
            f"{reader.folder} holds {extra[0]}{more(extra)}, of which its config.json says nothing (num_hidden_layers="
            f"{config.num_hidden_layers}, model_type={config.model_type!r}): it would be lost. Correct the config, or "
            "remove the tensor."
        )
    for name, tensor in expected.items():
        if name in found and found[name][0] != list(tensor.shape):
            raise ValueError(
                f"{reader.folder}: {name} has shape {found[name][0]}, but by its config.json it must have "
                f"{list(tensor.shape)}."
            )
    for name, tensor in expected.items():
        if name in found and tensor.is_floating_point() and found[name][1] not in FLOATS:
            raise ValueError(
                f"{reader.folder}: {name} holds {found[name][1]}: the weights are quantised. Give the original, or "
                "de-quantise and save it first, with its tokenizer."
            )


def check_class(folder: Path, expected: Iterable[str], tied: Container[str], found: Collection[str]) -> None:
    """Raise a `ValueError` for a complete decoder that another class than a causal language model's has saved."""
    decoder = [name for name in expected if name != HEAD and name not in tied]
    renamed = [name for name in decoder if name not in found]
    scores = [name for name in found if name.startswith(CLASSIFIER)]
    if any(name.removeprefix(BASE_PREFIX) not in found for name in renamed) or not (renamed or scores):
        return
    if scores:
        saved = f"{scores[0]}, the head of a classifier"
    else:
        saved = f"{renamed[0].removeprefix(BASE_PREFIX)} without {BASE_PREFIX!r} before it, as AutoModel saves it"
    if HEAD in found or HEAD in tied:
        raise ValueError(f"{folder} holds {saved}. Save it as a causal language model first: {SAVE_AGAIN}")
    raise ValueError(
        f"{folder} holds {saved}, and no {HEAD}, which AutoModelForCausalLM would draw at random. Give the causal "
        "language model that it was made of."
    )


def stored_dtype(reader: CheckpointReader | FusedReader) -> torch.dtype:
    """The type of most of a checkpoint's numbers, which have been checked by [`check_weights`]: some files hold norms
    or routers in another one than the matrices."""
    numbers: Counter[str] = Counter()
    for shape, kind in reader.headers().values():
        numbers[kind] += math.prod(shape)
    return FLOATS[max(FLOATS, key=lambda kind: numbers[kind])]


def more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
