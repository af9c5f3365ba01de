"""Writing the converted checkpoint: weights as they come, and everything beside them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from mha2mla.common.companions import copy_companions
from mha2mla.common.tokenizer import write_tokenizer

from .attention_weights import LatentAttention
from .balance import balanced
from .checkpoint import CheckpointWriter
from .job import ConversionJob
from .presets import ConvertedLayer


def write_weights(
    output: Path,
    job: ConversionJob,
    mla_config: PreTrainedConfig,
    layers: Iterable[ConvertedLayer],
    max_shard_bytes: int,
) -> list[dict]:
    """Write layer by layer; whatever is not attention is passed on. Returns what the record says of each layer."""
    records = []

    def attention() -> Iterator[LatentAttention]:
        for layer in layers:
            records.append({"rope_frequencies": layer.attention.rope_frequencies.tolist(), **layer.metrics})
            yield balanced(layer.attention)

    writer = CheckpointWriter(output, max_shard_bytes)
    for name, tensor in job.architecture.converted_tensors(job.tensors, attention()):
        dtype = mla_config.dtype if tensor.is_floating_point() else tensor.dtype
        writer.add(name, tensor.to("cpu", dtype).contiguous())
    writer.finish()
    check_complete(writer, mla_config)
    return records


def empty_model(mla_config: PreTrainedConfig) -> PreTrainedModel:
    """The converted model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(mla_config)


def check_complete(writer: CheckpointWriter, mla_config: PreTrainedConfig) -> None:
    """What was written is what the model loads, name by name."""
    model = empty_model(mla_config)
    expected = set(model.state_dict())
    if mla_config.tie_word_embeddings:
        expected -= set(model.all_tied_weights_keys)
    written = {name for shard in writer.shards for name in shard}
    assert written == expected, f"written and expected tensors differ: {sorted(written ^ expected)}"


def write_companions(
    output: Path, folder: Path, mla_config: PreTrainedConfig, trust_remote_code: bool = False
) -> None:
    """Config, code, tokenizer and generation config."""
    mla_config.save_pretrained(output)
    custom_object_save(empty_model(mla_config), output)
    copy_companions(folder, output)
    write_tokenizer(folder, output, trust_remote_code)
