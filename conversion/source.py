"""Finding a source checkpoint, and what lies in it beside the weights."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from mha2mla.common.loading import NOTICES

logger = logging.getLogger(__name__)

# What a checkpoint may carry beside its weights, and what the converted one takes over as it is.
COMPANION_PATTERNS = [
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    *NOTICES,
]


@contextmanager
def local_checkpoint(source: str, revision: str | None = None, gguf_file: str | None = None) -> Iterator[Path]:
    """
    The folder of a checkpoint given as a local folder, a GGUF file, or a name on the Hub.

    A GGUF checkpoint is de-quantised by transformers (which holds the whole model in memory) into a temporary folder.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        source, gguf_file, path = str(path.parent), path.name, path.parent
    if gguf_file is not None:
        with TemporaryDirectory(prefix="mha2mla-gguf-") as folder:
            dequantise_gguf(source, gguf_file, Path(folder), revision)
            yield Path(folder)
    elif path.is_dir():
        yield path
    elif path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise ValueError(f"No folder or .gguf file at {source}.")
    else:
        patterns = ["config.json", "adapter_config.json", "README.md", "*.safetensors", "*.safetensors.index.json"]
        patterns += COMPANION_PATTERNS
        yield Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def dequantise_gguf(source: str, gguf_file: str, folder: Path, revision: str | None = None) -> None:
    """Save a GGUF checkpoint as fp32 safetensors with its tokenizer, through transformers' own loader."""
    logger.info("De-quantising %s", gguf_file)
    kwargs = {"gguf_file": gguf_file, **({} if revision is None else {"revision": revision})}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)
    # The weights are plain fp32 by now; what still says "quantised" would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    # transformers 5.17 takes the wrong ones for some tokenizers; the config has those of the file.
    for name in ("bos", "eos", "pad"):
        number = getattr(model.config, f"{name}_token_id", None)
        if isinstance(number, int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    tokenizer.save_pretrained(folder)


def copy_companions(folder: Path, output: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config and licence as they are; returns the names copied."""
    copied = []
    for pattern in COMPANION_PATTERNS:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, output / file.name)
                copied.append(file.name)
    return copied


def load_config(folder: Path) -> PreTrainedConfig:
    """The source's config; a `ValueError` if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a transformers checkpoint.")
    return AutoConfig.from_pretrained(folder)
