"""Finding a source checkpoint and saying early what cannot be converted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.common.companions import COMPANION_PATTERNS
from mha2mla.common.scratch import scratch_folder

from .checkpoint import CheckpointReader
from .gguf_source import dequantise_gguf

logger = logging.getLogger(__name__)

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")


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
    elif path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise ValueError(f"No folder or .gguf file at {source}.")
    else:
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANION_PATTERNS]
        yield Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def load_config(folder: Path) -> PreTrainedConfig:
    """The source's config, once everything that the conversion relies on has been checked."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a transformers checkpoint.")
    config = AutoConfig.from_pretrained(folder)
    check_supported(config)
    return config


def check_supported(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` that names the field and the remedy if the architecture cannot be converted."""
    model_type = config.model_type
    if model_type == "mla_llama":
        raise ValueError("model_type is 'mla_llama': this checkpoint has been converted already. Give its source.")
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, field, None):
            raise ValueError(
                f"{field}={getattr(config, field)}: mixture-of-experts models are not supported. Use a dense model "
                f"({', '.join(SUPPORTED_MODEL_TYPES)})."
            )
    if model_type in ("qwen3", "gemma3_text", "olmo2"):
        raise ValueError(
            f"model_type={model_type!r}: its queries and keys are normalised head by head (qk-norm), which a latent "
            f"cannot carry. Use a model without qk-norm ({', '.join(SUPPORTED_MODEL_TYPES)})."
        )
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r} is not supported; it must be one of {SUPPORTED_MODEL_TYPES}.")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"sliding_window={config.sliding_window}: a window bounds the cache already, and the converted model "
            "would not keep it. If the model never meets longer texts, set sliding_window to null in its config.json."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config: the weights are quantised. De-quantise and save them first "
            "(from_pretrained(...).dequantize().save_pretrained(folder)), or give the original."
        )
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise ValueError(f"rope_parameters.partial_rotary_factor={factor}: only fully rotated heads are supported.")
    if head_dim(config) % 2 != 0:
        raise ValueError(f"head_dim={head_dim(config)} must be even for rotary embeddings.")


def check_tensors(reader: CheckpointReader) -> None:
    """Raise a `ValueError` for weights that an unsuspicious config does not tell of."""
    for name in ("q_norm", "k_norm"):
        if f"model.layers.0.self_attn.{name}.weight" in reader:
            raise ValueError(
                f"The checkpoint has self_attn.{name} weights (qk-norm), which a latent cannot carry. Use a model "
                "without them."
            )


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_attention_scaling(config: PreTrainedConfig) -> float:
    """The factor on cosines and sines that yarn and longrope bring along; 1 for all other types."""
    return float(LlamaRotaryEmbedding(config).attention_scaling)
