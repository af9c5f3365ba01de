"""Finding a source checkpoint and saying early what cannot be converted."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.common.loading import NOTICES

from .checkpoint import CheckpointReader

logger = logging.getLogger(__name__)

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")
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
