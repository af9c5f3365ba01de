"""GGUF checkpoints, de-quantised by transformers' own loader, and what that loader passes over in silence.

transformers reads the sizes and the weights that it has names for. A field or tensor that changes what the model
computes and that it has no name for is handled here (scaling of rotary frequencies) or refused by name.
"""

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import is_gguf_available

from mha2mla.common.extras import installing
from mha2mla.common.files import no_file
from mha2mla.common.hub import check_on_hub, on_hub

logger = logging.getLogger(__name__)

# Fields after "ARCHITECTURE." that transformers reads, that are compared with what it read, or that compute nothing.
KNOWN_FIELDS = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",  # refused where any text of the model's length would feel it
    "rope.dimension_count",
    "rope.freq_base",
    "tensor_data_layout",
}
SCALING_FIELDS = {
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
KNOWN_TENSORS = re.compile(
    r"(token_embd|output_norm|output)\.weight|rope_freqs\.weight"
    r"|blk\.\d+\.((attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down)\.weight"
    r"|attn_[qkv]\.bias)"
)
# The rule of Llama 3.1 and later (`rope_type: llama3`), whose result a file holds as one factor a frequency.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def dequantise_gguf(source: str, gguf_file: str, folder: Path, revision: str | None = None) -> None:
    """
    Save a GGUF checkpoint as fp32 safetensors with its tokenizer.

    Args:
        source (`str`): Folder or repository on the Hub that holds the file.
        gguf_file (`str`): Its name there.
        folder (`Path`): Where the checkpoint goes.

    Raises:
        ValueError: If the file is damaged, or holds what transformers' loader would ignore.
    """
    check_gguf_package(gguf_file)
    local = Path(source) / gguf_file
    if not local.is_file():
        if not on_hub(source):
            raise ValueError(no_file(local))
        check_on_hub(source, "source", gguf_file, revision)
        local = Path(hf_hub_download(source, gguf_file, revision=revision))
    fields, tensors = read_gguf(local)
    changes = gguf_changes(fields, tensors, name=gguf_file)
    logger.info("De-quantising %s", gguf_file)
    kwargs = {"gguf_file": gguf_file, **({} if revision is None else {"revision": revision})}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except Exception as error:  # whatever a file of wrong sizes makes of the loader
        raise ValueError(f"{gguf_file} cannot be loaded ({error}): is it complete, and a language model?") from error
    for field, value in changes.items():
        setattr(model.config, field, value)
    # The weights are plain fp32 by now; what still says "quantised" would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    set_special_tokens(tokenizer, model.config)
    set_chat_templates(tokenizer, fields)
    tokenizer.save_pretrained(folder)


def gguf_config(path: Path) -> PreTrainedConfig:
    """The config of a GGUF file, as [`dequantise_gguf`] would save it; no weights are read. Its errors."""
    check_gguf_package(path.name)
    changes = gguf_changes(*read_gguf(path), name=path.name)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever a file of wrong sizes makes of the loader
        raise ValueError(f"{path} cannot be loaded ({error}): is it complete, and a language model?") from error
    for field, value in changes.items():
        setattr(config, field, value)
    return config


def check_gguf_package(gguf_file: str) -> None:
    if not is_gguf_available():
        raise ValueError(f"Reading {gguf_file} needs the package gguf: {installing('gguf')}.")


def set_special_tokens(tokenizer, config: PreTrainedConfig) -> None:
    """transformers 5.17 takes the wrong ones for some tokenizers; the config has those of the file."""
    for name in ("bos", "eos", "pad"):
        number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))


def set_chat_templates(tokenizer, fields: dict[str, Any]) -> None:
    """transformers reads the default template only; those with names, for tools or retrieval, stand beside it."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in fields.items() if key.startswith(prefix)}
    if named:
        default = {"default": tokenizer.chat_template} if tokenizer.chat_template else {}
        tokenizer.chat_template = default | named


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor | None]]:
    """Fields of a GGUF file (lists only if they are short) and its tensors by name, of which only `rope_freqs.weight`
    is read."""
    from gguf import GGUFReader  # an optional dependency

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) <= 4096}
        tensors = {
            tensor.name: torch.tensor(tensor.data).float() if tensor.name == "rope_freqs.weight" else None
            for tensor in reader.tensors
        }
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(f"{path} is not a readable GGUF file ({error}): download it again.") from None
    if "general.architecture" not in fields:
        raise ValueError(f"{path} has no general.architecture: it is not a model.")
    return fields, tensors


def gguf_changes(
    fields: dict[str, Any], tensors: dict[str, torch.Tensor | None], name: str = "The GGUF file"
) -> dict[str, Any]:
    """
    What the config must say besides what transformers' loader makes of a file.

    Args:
        fields (`dict`): Of the file, by name.
        tensors (`dict`): Names of its tensors, with the content of `rope_freqs.weight`, [head_dim / 2].
        name (`str`): Of the file, for messages.

    Returns:
        Values of the config by field.

    Raises:
        ValueError: For a field or a tensor that would be ignored, by its name.
    """
    architecture = fields["general.architecture"]
    own = {
        key.removeprefix(f"{architecture}."): value for key, value in fields.items() if key.startswith(architecture)
    }
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"{name} is one of {fields['split.count']} parts. Join them first: gguf-split --merge.")
    window = own.get("attention.sliding_window")
    if window and window < own.get("context_length", math.inf):
        raise ValueError(
            f"{name} says {architecture}.attention.sliding_window={window}: a window bounds the cache already, and "
            "the converted model would not keep it."
        )
    for field, value in own.items():
        if field not in KNOWN_FIELDS | SCALING_FIELDS:
            raise ValueError(
                f"{name} says {architecture}.{field}={value!r:.60}, which transformers' loader of GGUF files ignores. "
                "Convert the safetensors checkpoint that the file was made from."
            )
    for field, value in own.items():
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise ValueError(f"{name} has layers of different {field} ({value}), which cannot be converted.")
            own[field] = value[0] if value else 0
    for field in ("embedding_length", "attention.head_count"):
        if not own.get(field):
            raise ValueError(f"{name} does not say {architecture}.{field}. Is it complete, and a language model?")
    unknown = [tensor for tensor in tensors if not KNOWN_TENSORS.fullmatch(tensor)]
    if architecture != "qwen2":  # the only family here whose config implies biases
        unknown += [tensor for tensor in tensors if tensor.endswith(".bias") and tensor not in unknown]
    if unknown:
        raise ValueError(
            f"{name} holds {unknown[0]} (and {len(unknown) - 1} more like it), which transformers' loader of GGUF "
            "files ignores. Convert the safetensors checkpoint that the file was made from."
        )
    width = own["embedding_length"] // own["attention.head_count"]  # of a head, where the file does not say it
    head_dim = own.get("rope.dimension_count") or width
    for field in ("attention.key_length", "attention.value_length"):
        if own.get(field, width) != head_dim:
            raise ValueError(
                f"{name} has {architecture}.{field}={own.get(field, width)}, but rotates {head_dim} dims: "
                "transformers' loader does not read heads of which a part is rotated. Convert the safetensors "
                "checkpoint."
            )
    factors = tensors.get("rope_freqs.weight")
    if factors is not None and len(factors) != head_dim // 2:
        raise ValueError(f"{name} has {len(factors)} factors in rope_freqs.weight for {head_dim // 2} frequencies.")
    changes: dict[str, Any] = {}
    rope = rope_scaling(own, factors, name)
    if rope is not None:
        changes["rope_parameters"] = {"rope_theta": float(own.get("rope.freq_base", 10000.0)), **rope}
    return changes


def rope_scaling(own: dict[str, Any], factors: torch.Tensor | None, name: str) -> dict[str, Any] | None:
    """transformers' parameters of the file's scaling of rotary frequencies; None if there is none."""
    kind = own.get("rope.scaling.type", "linear" if own.get("rope.scale_linear", 1.0) != 1.0 else "none")
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)))
    if factors is not None:
        if kind != "none":
            raise ValueError(
                f"{name} scales its rotary frequencies twice, by rope_freqs.weight and rope.scaling.{kind}."
            )
        return llama3_scaling(factors, float(own.get("rope.freq_base", 10000.0)), name)
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        if "rope.scaling.original_context_length" not in own:
            raise ValueError(f"{name} scales by yarn and does not say rope.scaling.original_context_length.")
        original = int(own["rope.scaling.original_context_length"])
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ValueError(
        f"{name} says rope.scaling.type={kind!r}, which is not handled (linear and yarn are). Convert the safetensors "
        "checkpoint that the file was made from."
    )


def llama3_scaling(factors: torch.Tensor, theta: float, name: str) -> dict[str, Any]:
    """
    Parameters of `rope_type: llama3` from the factors that it divides the frequencies by.

    Args:
        factors (`torch.Tensor`): Of each frequency, [head_dim / 2], the fastest first.
        theta (`float`): Base of the frequencies.

    Raises:
        ValueError: If the factors are not those of Llama 3.1's rule.
    """
    factor = factors.max().item()
    low, high, original = LLAMA3.values()
    wavelengths = 2 * torch.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(factors.double(), expected, rtol=1e-3):
        raise ValueError(
            f"{name} has a rope_freqs.weight that is not of Llama 3.1's rule ({LLAMA3}, factor {factor:g}). Convert "
            "the safetensors checkpoint that the file was made from."
        )
    return {"rope_type": "llama3", "factor": round(factor, 4), **LLAMA3}
