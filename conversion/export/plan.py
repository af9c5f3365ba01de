"""What can be exported, and with which sizes: all that is found out before weights are read."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from mha2mla.common.adapters import ADAPTER_CONFIG, merge_first
from mha2mla.common.extras import installing
from mha2mla.common.files import read_json_object
from mha2mla.common.kernel_sizes import KERNEL_HEAD_DIM, KERNEL_ROPE_DIM
from mha2mla.common.loading import keys_values_width, load_config
from mha2mla.common.records import RECORD_NAME, read_record
from mha2mla.conversion.cache_plan import SERVED_BYTES
from mha2mla.conversion.checkpoint import CheckpointReader
from mha2mla.conversion.config import ConversionConfig
from mha2mla.modeling import LatentConfigMixin, MLALlamaConfig, MLAMixtralConfig
from mha2mla.modeling.latent_config import NORMALISED_PROJECTIONS

from .config import CPU_BLOCK, ExportConfig
from .rope_table import LENGTH_DEPENDENT, RopeTable, fit_table, frequency_places

OurConfig = MLALlamaConfig | MLAMixtralConfig  # of what DeepSeek's block can express
# A remedy for what DeepSeek's form cannot say.
AS_IT_IS = f"Run the model as it is, in transformers or by the vLLM plugin ({installing('vllm')}; docs/serving.md)"


@dataclass(frozen=True)
class ExportPlan:
    """
    Sizes of the exported model, padding included, and its rotary table.

    Attributes:
        table (`RopeTable`): Slots of the source's frequencies.
        kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim (`int`): R', r', nope', v'.
    """

    table: RopeTable
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int

    @property
    def width(self) -> int:
        """Values that an engine caches per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def describe(self, config: OurConfig, served: str) -> str:
        """What a token costs in an engine, in the type of [`served_dtype`], padding included."""
        ours, source = config.latent_cache_dim, keys_values_width(config)
        size = self.width * config.num_hidden_layers * SERVED_BYTES
        line = (
            f"Cache: {self.width} values per token and layer (latent {self.kv_lora_rank} + rotary key "
            f"{self.qk_rope_head_dim}), {size:,} bytes per token in {served}; the source's has {source} "
            f"({100 * (self.width / source - 1):+.1f} %)"
        )
        if self.width > ours:
            line += f". {ours} of them hold something; the others are zeros, and cost {self.width / ours - 1:.1%} more"
        return line


def whole_blocks(size: int) -> int:
    """The next size that llama.cpp's CPU code has nothing left over of."""
    return -(-size // CPU_BLOCK) * CPU_BLOCK


def advise_padding(plan: ExportPlan) -> str | None:
    """What would make llama.cpp faster on a CPU, if something would."""
    rank, rope = whole_blocks(plan.kv_lora_rank), whole_blocks(plan.qk_rope_head_dim)
    if rank == plan.kv_lora_rank:
        return None
    return (
        f"On a CPU llama.cpp takes {CPU_BLOCK} numbers of a latent at a time (64 with AVX-512), and what is left of "
        f"{plan.kv_lora_rank} one by one: with --pad {rank} a cache of {rank + rope} values is read faster"
    )


def load_model_config(folder: Path, model: str) -> OurConfig:
    """
    The config of one of our checkpoints.

    Raises:
        ValueError: If it is something else: an adapter, a model that is not converted, an earlier export.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ValueError(f"{model} is an adapter of {base}, and an export holds a whole model. {merge_first(folder)}")
    config = load_config(str(folder))
    if config.model_type in ("deepseek_v2", "deepseek_v3"):
        raise ValueError(
            f"{model} is a DeepSeek checkpoint already (model_type={config.model_type!r}): serve it as it is, or make "
            f"a model of our family of it by `mha2mla export {model} OUTPUT --format mla-llama`."
        )
    if not isinstance(config, LatentConfigMixin):
        raise ValueError(
            f"{model} has model_type={config.model_type!r}: it is not converted. Convert it first: "
            f"`mha2mla convert {model} CONVERTED --cache-ratio 0.3125 --data TEXT`."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} has quantised weights. Export the model as it was before that.")
    check_architecture(config, convert_command(folder, config))
    assert isinstance(config, OurConfig)
    return config


def convert_command(folder: Path, config: LatentConfigMixin) -> str:
    """The command that would convert the same source for engines, as far as the folder's record tells."""
    record = read_record(folder) if (folder / RECORD_NAME).is_file() else {}
    options = record.get("options", {})
    words = ["mha2mla", "convert", record.get("source", "SOURCE"), "CONVERTED"]
    words += ["--kv-lora-rank", str(config.kv_lora_rank), "--qk-rope-head-dim", str(config.qk_rope_head_dim)]
    words += ["--data", options.get("data") or "TEXT"]
    for name in ("column", "subset", "split"):
        if options.get(name) not in (None, getattr(ConversionConfig, name)):
            words += [f"--{name}", options[name]]
    return shlex.join(words)


def check_architecture(config: LatentConfigMixin, remedy: str) -> None:
    """
    Raises:
        ValueError: For what DeepSeek's attention and block do not have, whatever the weights are.
    """
    if config.attention_projections == NORMALISED_PROJECTIONS:
        raise ValueError(
            f"model_type={config.model_type!r}: queries and keys are normalised (qk-norm), which DeepSeek's attention "
            f"cannot express. {AS_IT_IS}."
        )
    if config.num_rope_key_heads != 1:
        raise ValueError(
            f"num_rope_key_heads={config.num_rope_key_heads}: the model has a rotary key for each key/value head, and "
            f"DeepSeek's attention has one for all heads. Convert with one: `{remedy}`."
        )
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise ValueError(
                f"{field}=True: the model's projections have biases (as Qwen2's), and DeepSeek's have none. "
                f"{AS_IT_IS}, or convert a source without them."
            )
    if not config.rms_norm_eps > 0:
        raise ValueError(
            f"rms_norm_eps={config.rms_norm_eps}: an export scales the model by its eps, which must be above 0. "
            f"{AS_IT_IS}, or set a small one (1e-12) in its config.json."
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r}: engines run DeepSeek's MLP with 'silu' only.")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in LENGTH_DEPENDENT:
        raise ValueError(
            f"rope_parameters.rope_type={rope_type!r} changes the frequencies with the length of the text, which "
            f"engines do not do for DeepSeek. {AS_IT_IS}. If short texts are all you need, set rope_type to 'default' "
            "in the source's config.json and convert it again."
        )


def common_frequencies(reader: CheckpointReader, config: OurConfig, remedy: str) -> list[int]:
    """
    The frequencies that all layers use, as indices of the source's table, ascending.

    Raises:
        ValueError: If layers differ, or one uses a frequency twice.
    """
    common: list[int] = []
    most = config.head_dim // 2 - 1
    for index in range(config.num_hidden_layers):
        used = sorted(reader.get(f"model.layers.{index}.self_attn.rope_frequencies").flatten().tolist())
        if not 0 <= used[0] <= used[-1] <= most:
            raise ValueError(f"Layer {index} uses the rotary frequencies {used}, and there are 0 to {most}.")
        common = common or used
        if used != common:
            raise ValueError(
                f"Layers use different rotary frequencies (layer 0: {common}; layer {index}: {used}), and DeepSeek's "
                f"config has one list for all. {AS_IT_IS}, or convert with a common one: `{remedy}`."
            )
        twice = sorted({frequency for frequency in used if used.count(frequency) > 1})
        if twice:
            raise ValueError(
                f"Layer {index} uses the rotary frequencies {twice} more than once, and DeepSeek's config has each "
                f"once. {AS_IT_IS}, or convert with a list of different ones: `{remedy}`."
            )
    return common


def find_table(
    config: PreTrainedConfig, frequencies: list[int], allow_step: bool, num_slots: int | None, remedy: str
) -> RopeTable:
    """
    Raises:
        ValueError: If no stock table holds the frequencies.
    """
    places, theta = frequency_places(config), config.rope_parameters["rope_theta"]
    table = fit_table(places, frequencies, theta, allow_step, num_slots)
    if table is not None:
        return table
    smallest = fit_table(places, frequencies, theta, allow_step)
    if smallest is not None and num_slots is not None and smallest.num_slots <= num_slots:
        raise ValueError(
            f"A rotary table of {num_slots} slots, which kernels have, has no rope_theta in fp32 where head_dim="
            f"{config.head_dim} and rope_theta={theta:g}: the last slots turn too slowly. Leave --pad out: "
            "transformers then runs it."
        )
    if smallest is not None:
        raise ValueError(
            f"The rotary frequencies {frequencies} need a table of {smallest.num_slots} slots, and kernels have "
            f"{num_slots}. Leave --pad out (transformers then runs it), or convert with fewer: `{remedy}`."
        )
    kept = [index for index in range(len(places)) if places[index] == index]
    moved = [index for index in frequencies if index not in kept]
    known = "engines know" if allow_step else "llama.cpp knows"
    if len(kept) >= len(frequencies):
        remedy = f"It leaves {kept} where they are: convert with frequencies among these: `{remedy}`."
    elif kept:
        remedy = f"It leaves {kept} only. {AS_IT_IS}, or convert with --qk-rope-head-dim {2 * len(kept)} or less."
    else:
        remedy = f"It leaves none where it is. {AS_IT_IS}, or convert a source without it."
    raise ValueError(
        f"The rotary frequencies {frequencies} are in no table that {known}: "
        f"rope_parameters.rope_type={config.rope_parameters['rope_type']!r} moves {moved} of them. {remedy}"
    )


def plan_export(
    folder: Path, config: OurConfig, reader: CheckpointReader, options: ExportConfig, allow_step: bool
) -> ExportPlan:
    """
    Sizes and rotary table of an export of our model in `folder`.

    Args:
        allow_step (`bool`): Whether the engine knows yarn's step, see [`RopeTable`].

    Raises:
        ValueError: If the model cannot be said in DeepSeek's terms; what, why, and what would make one that can.
    """
    remedy = convert_command(folder, config)
    frequencies = common_frequencies(reader, config, remedy)
    if options.pad is None:
        table = find_table(config, frequencies, allow_step, None, remedy)
        return ExportPlan(table, config.kv_lora_rank, 2 * table.num_slots, config.qk_nope_head_dim, config.v_head_dim)
    if config.kv_lora_rank > options.pad:
        raise ValueError(
            f"kv_lora_rank={config.kv_lora_rank} is more than pad={options.pad}. Pad to more, or convert with a "
            f"smaller latent: `{remedy}`."
        )
    if options.format == "gguf":
        table = find_table(config, frequencies, allow_step, None, remedy)
        rope = whole_blocks(2 * table.num_slots)
        return ExportPlan(table, options.pad, rope, config.qk_nope_head_dim, config.v_head_dim)
    for field in ("qk_nope_head_dim", "v_head_dim"):
        if getattr(config, field) > KERNEL_HEAD_DIM:
            raise ValueError(
                f"{field}={getattr(config, field)} is more than the {KERNEL_HEAD_DIM} of GPU kernels. Leave --pad "
                "out: transformers runs any size."
            )
    table = find_table(config, frequencies, allow_step, KERNEL_ROPE_DIM // 2, remedy)
    return ExportPlan(table, options.pad, KERNEL_ROPE_DIM, KERNEL_HEAD_DIM, KERNEL_HEAD_DIM)
