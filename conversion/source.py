"""Finding a source checkpoint, and what lies in it beside the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from mha2mla.common.adapters import ADAPTER_CONFIG
from mha2mla.common.companions import COMPANION_PATTERNS
from mha2mla.common.exports import EXPORT_RECORD_NAME
from mha2mla.common.hub import check_on_hub, on_hub
from mha2mla.common.loading import load_config
from mha2mla.common.scratch import scratch_folder

from .checkpoint import INDEX_NAME, WEIGHTS_NAME, read_index
from .gguf_source import dequantise_gguf, gguf_config


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
        with scratch_folder("mha2mla-gguf-") as folder:
            dequantise_gguf(source, gguf_file, folder, revision)
            yield folder
    elif path.is_dir():
        yield path
    elif not on_hub(source):
        raise ValueError(
            f"There is no folder or .gguf file {source}. Check the path; a name on the Hub has the form OWNER/NAME."
        )
    else:
        check_on_hub(source, "source", revision=revision)
        yield download(source, revision)


def download(source: str, revision: str | None) -> Path:
    """The folder of a checkpoint on the Hub, with those weights only that transformers loads: some lie there twice, in
    the form of their makers, too."""
    index = Path(snapshot_download(source, revision=revision, allow_patterns=[INDEX_NAME])) / INDEX_NAME
    shards = sorted(set(read_index(index).values())) if index.is_file() else []
    patterns = ["config.json", ADAPTER_CONFIG, "README.md", WEIGHTS_NAME, INDEX_NAME, *shards]
    patterns += [EXPORT_RECORD_NAME, *COMPANION_PATTERNS]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def source_config(source: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a checkpoint given as to [`local_checkpoint`]; of one on the Hub nothing else is downloaded."""
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return gguf_config(path)
    return load_config(source, "source", revision=revision)
