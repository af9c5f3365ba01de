"""Our model as a GGUF file that llama.cpp runs, as the architecture `deepseek2` (multi-head latent attention).

The weights are those of `deepseek.py` in another gauge: quantised blocks have float16 scales, for which that one's
latents are too small, and llama.cpp takes `rms_norm_eps` for the latents' norm too, so that any eps will do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from transformers import DeepseekV3Config
from transformers.utils import is_gguf_available

from mha2mla.common.extras import installing
from mha2mla.common.outputs import real_path
from mha2mla.common.scratch import scratch_folder
from mha2mla.conversion.checkpoint import CheckpointReader
from mha2mla.modeling import MLALlamaConfig

from .deepseek import Gauge, stock_names, stock_tensors
from .gguf_vocab import Vocabulary, add_vocabulary
from .plan import ExportPlan

OURS = "mha2mla.model"  # metadata that tells a file of ours
BLOCK = 32  # values that a q8_0 block holds


def big_gauge(eps: float, dtype: str) -> Gauge:
    """For llama.cpp; all factors are powers of two. What makes the norm do nothing is how small latents are beside the
    residual stream: q8_0 wants neither small, for its scales, and float16 wants neither large."""
    residual = 2.0 ** (11 if dtype == "float16" else 14)
    return Gauge.make(eps, eps * residual**2, residual * 2.0**-18)


def check_package() -> None:
    if not is_gguf_available():
        raise ValueError(f"format='gguf' needs the package gguf: {installing('gguf')}.")


def check_output_file(output: Path, overwrite: bool) -> None:
    """Refuse to touch a file that is there, unless `overwrite` is set and an export made it."""
    if output.suffix != ".gguf" or output.is_dir():
        raise ValueError(f"format='gguf' writes a file: OUTPUT must end in .gguf, got {output}.")
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists already. Choose another name, or pass --overwrite to replace it.")
    from gguf import GGUFReader

    try:
        ours = GGUFReader(output).get_field(OURS) is not None
    except (ValueError, IndexError):  # no GGUF file, or half of one
        ours = False
    if not ours:
        raise ValueError(f"{output} is no earlier output of the export, and --overwrite will not delete it.")


@contextmanager
def atomic_file(output: Path) -> Iterator[Path]:
    """A new file in a folder beside `output` that takes its name only when the body has run to its end. What a killed
    run leaves, the next one removes."""
    real = real_path(output)
    with scratch_folder(f".{real.name}.partial-", real.parent) as folder:
        yield folder / real.name
        os.replace(folder / real.name, real)


@cache
def name_map(num_layers: int):
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, num_layers)


def file_name(name: str, num_layers: int) -> str:
    """The name that a tensor of the stock class has in a file."""
    found = name_map(num_layers).get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    return found


def split_up_projection(name: str, tensor: torch.Tensor, plan: ExportPlan) -> dict[str, torch.Tensor]:
    """`kv_b_proj` [H * (nope + v), R] as llama.cpp absorbs it: keys [H, R, nope] and values [H, v, R]."""
    up = tensor.unflatten(0, (-1, plan.qk_nope_head_dim + plan.v_head_dim))
    keys, values = up.split([plan.qk_nope_head_dim, plan.v_head_dim], dim=1)
    return {name.replace("kv_b", "k_b"): keys.transpose(1, 2), name.replace("kv_b", "v_b"): values}


def encode(name: str, tensor: torch.Tensor, dtype: str):
    """A tensor's bytes as llama.cpp has them, and their type. Norms stay float32, as everywhere in llama.cpp."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    kind = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "q8_0": Kind.Q8_0}[dtype]
    if tensor.dim() == 1:
        kind = Kind.F32
    elif kind == Kind.Q8_0 and tensor.shape[-1] % BLOCK != 0:
        kind = Kind.F16
    values = tensor.to(torch.float32).contiguous().numpy()
    if kind == Kind.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(
            f"{name} has values beyond float16 in the scale that llama.cpp needs. Export with --dtype bfloat16."
        )
    return quants.quantize(values, kind), kind


def add_metadata(writer, stock: DeepseekV3Config, plan: ExportPlan, dtype: str, model: str) -> None:
    """What llama.cpp asks of `deepseek2`; layers are all dense, so that experts are said to be there and never are."""
    import gguf

    kinds = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_name(Path(model).name)
    writer.add_string(OURS, model)
    writer.add_file_type(kinds[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(stock.vocab_size)
    writer.add_context_length(stock.max_position_embeddings)
    writer.add_embedding_length(stock.hidden_size)
    writer.add_block_count(stock.num_hidden_layers)
    writer.add_feed_forward_length(stock.intermediate_size)
    writer.add_head_count(stock.num_attention_heads)
    writer.add_head_count_kv(1)  # one latent for all heads: what makes llama.cpp cache latents
    writer.add_layer_norm_rms_eps(stock.rms_norm_eps)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(plan.kv_lora_rank)
    writer.add_key_length(plan.width)
    writer.add_value_length(plan.kv_lora_rank)
    writer.add_key_length_mla(plan.qk_nope_head_dim + plan.qk_rope_head_dim)
    writer.add_value_length_mla(plan.v_head_dim)
    writer.add_rope_dimension_count(plan.qk_rope_head_dim)
    writer.add_rope_freq_base(stock.rope_parameters["rope_theta"])
    writer.add_leading_dense_block_count(stock.num_hidden_layers)
    writer.add_expert_count(stock.n_routed_experts)
    writer.add_expert_used_count(1)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(stock.moe_intermediate_size)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def write_gguf(
    path: Path,
    vocabulary: Vocabulary | None,
    model: str,
    reader: CheckpointReader,
    config: MLALlamaConfig,
    stock: DeepseekV3Config,
    plan: ExportPlan,
    gauge: Gauge,
    dtype: str,
) -> None:
    """Write the file; tensors wait in a temporary file, as their places are told before them."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "deepseek2", use_temp_file=True)
    add_metadata(writer, stock, plan, dtype, model)
    add_vocabulary(writer, vocabulary)
    tensors = stock_tensors(reader, config, plan, gauge, torch.float32)
    for name, tensor in tqdm(tensors, desc="Writing", unit="tensor", total=len(stock_names(stock))):
        parts = split_up_projection(name, tensor, plan) if "kv_b_proj" in name else {name: tensor}
        for part, values in parts.items():
            data, kind = encode(part, values, dtype)
            writer.add_tensor(file_name(part, config.num_hidden_layers), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class GGUFTensors:
    """A file's tensors under the stock class's names, as fp32."""

    def __init__(self, path: Path, stock: DeepseekV3Config):
        from gguf import GGUFReader

        self.tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        self.num_layers = stock.num_hidden_layers
        self.names = stock_names(stock)

    def _read(self, name: str) -> torch.Tensor:
        from gguf import quants

        tensor = self.tensors[file_name(name, self.num_layers)]
        return torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    def get(self, name: str) -> torch.Tensor:
        if "kv_b_proj" not in name:
            return self._read(name)
        keys, values = (self._read(name.replace("kv_b", part)) for part in ("k_b", "v_b"))
        return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)

    def with_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name[len(prefix) :]: self.get(name) for name in self.names if name.startswith(prefix)}
