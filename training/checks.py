"""What can be found wrong before weights are read: minutes earlier than the model would find it."""

import os
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_peft_available

from mha2mla.common.adapters import ADAPTER_CONFIG, MERGED, RUN_SETTINGS
from mha2mla.common.exports import EXPORT_RECORD_NAME
from mha2mla.common.extras import installing
from mha2mla.common.files import shown
from mha2mla.common.loading import find_file, load_config, load_tokenizer
from mha2mla.common.records import RECORD_NAME, read_record
from mha2mla.modeling import LatentConfigMixin

from .arguments import DataArguments, LossArguments, ModelArguments
from .losses import Setting
from .parameters import LORA, check_lora_targets, freeze_except, meta_model
from .resume import (
    checkpoints,
    find_checkpoint,
    is_finished,
    lacks_merged,
    newest_checkpoint,
    read_state,
    wants_resume,
)
from .trainer_arguments import ON_CPU, RecoveryTrainingArguments

# What tells the folder of a model, an adapter or an export.
OF_MODELS = ("config.json", ADAPTER_CONFIG, RECORD_NAME, EXPORT_RECORD_NAME, "*.safetensors", "pytorch_model*.bin")


def check_model(model: ModelArguments, length: int) -> tuple[LatentConfigMixin, list[str]]:
    """
    Returns:
        The config, and the names of what is trained: parameters, or modules that get adapters.

    Raises:
        ValueError: If the checkpoint is not converted, its context is shorter than a row, or what is to be trained is
            not there; tried on the model without its weights.
    """
    config = load_config(model.model, "model", model.trust_remote_code)
    if not isinstance(config, LatentConfigMixin) and find_file(model.model, EXPORT_RECORD_NAME) is not None:
        raise ValueError(
            f"{model.model} is an export (model_type={config.model_type!r}), which is for engines. Train the model "
            f"that it was made of, or make one of it by `mha2mla export {model.model} OUTPUT --format mla-llama`."
        )
    if not isinstance(config, LatentConfigMixin):
        raise ValueError(
            f"{model.model} has model_type={config.model_type!r}: it is not converted. Run `mha2mla convert` first, "
            "and train what it writes."
        )
    if length > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"length={length} is more than the model's context, {most}: give --length {most} or less.")
    empty = meta_model(config)
    if model.trainable == LORA:
        if not is_peft_available():
            raise ValueError(f"trainable='lora' needs peft: {installing('train')}.")
        targets = model.lora_targets or config.attention_projections
        check_lora_targets(empty, targets)
        trained = [name for name, _ in empty.named_modules() if name.rsplit(".", 1)[-1] in targets]
    else:
        freeze_except(empty, model.trainable)
        trained = [name for name, parameter in empty.named_parameters() if parameter.requires_grad]
    return config, trained


def check_losses(
    loss: LossArguments,
    config: PreTrainedConfig,
    trained: list[str],
    tokenizer: PreTrainedTokenizerBase,
    arguments: RecoveryTrainingArguments,
    trust_remote_code: bool = False,
) -> None:
    """
    Args:
        config (`PreTrainedConfig`), trained (`list[str]`): As [`check_model`] gives them.
        tokenizer (`PreTrainedTokenizerBase`): Of the model that is trained.

    Raises:
        ValueError: If the teacher is the model or has other tokens, or a loss cannot be computed.
    """
    teacher_config = None
    if loss.teacher is not None:
        teacher_config = check_teacher(loss.teacher, config, tokenizer, trust_remote_code)
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    sharded = bool(launched or arguments.fsdp or arguments.deepspeed_plugin)
    active = [each for _, each in loss.weighed]
    setting = Setting(config, loss.teacher, teacher_config, trained, sharded, active)
    for each in loss.losses.values():
        each.check(setting)


def check_teacher(
    teacher: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> PreTrainedConfig:
    """The teacher's config; a `ValueError` if it is the model that is trained, or has other tokens."""
    model = config.name_or_path
    if Path(teacher).resolve() == Path(model).resolve():  # equal names on the Hub, too
        source = read_record(model).get("source") if find_file(model, RECORD_NAME) else None
        raise ValueError(
            f"The teacher {teacher} is the model itself, from which there is nothing to learn. Give the original that "
            f"it was converted from{f': --teacher {source}' if source else ''}."
        )
    other = load_config(teacher, "teacher", trust_remote_code)
    if other.vocab_size != config.vocab_size:
        raise ValueError(
            f"The teacher {teacher} has vocab_size={other.vocab_size}, the model {config.vocab_size}: their "
            "predictions cannot be compared. Give the model that was converted."
        )
    if load_tokenizer(teacher, "teacher", trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"The tokenizer of the teacher {teacher} differs from the model's. Give the model's source.")
    return other


def check_run(
    model: ModelArguments, loss: LossArguments, data: DataArguments, arguments: RecoveryTrainingArguments
) -> None:
    """
    Raises:
        ValueError: If the settings of the run do not go together, or its folder holds another run or model.
    """
    if not arguments.output_dir:
        raise ValueError("output_dir is empty: give --output, the folder for checkpoints and the trained model.")
    for role, name in (("model", model.model), ("teacher", loss.teacher)):
        if name is not None and Path(name).is_dir() and Path(name).resolve() == Path(arguments.output_dir).resolve():
            raise ValueError(f"output_dir={arguments.output_dir} is the {role}, which would be lost. Choose another.")
    there = {*get_available_reporting_integrations(), "flyte"}  # the one that is not asked about
    for name in arguments.report_to:
        if name not in there:
            raise ValueError(
                f"report_to={name!r} is not installed, or transformers does not know it. There are "
                f"{', '.join(sorted(there - {'flyte'})) or 'none here'}; none turns them off."
            )
    if arguments.push_to_hub and model.trainable == LORA and Path(model.model).is_dir():
        raise ValueError(
            f"push_to_hub: the adapter would name its base model {model.model}, a folder that nobody else has. Push "
            "that first and train from its name on the Hub, or push by `mha2mla push --base-model` afterwards."
        )
    if data.streaming and arguments.max_steps <= 0:
        raise ValueError("A stream has no length: give --max_steps.")
    if arguments.eval_strategy != "no" and data.eval_data is None and data.eval_fraction == 0:
        raise ValueError("eval_strategy needs held-out text: give --eval_data or --eval_fraction.")
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs, which torch's DataParallel would share. Start with `accelerate "
            "launch -m mha2mla.cli.main train ...`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if model.attn_implementation == "flex_attention" and arguments.device.type == "cpu":
        raise ValueError(f"attn_implementation='flex_attention' trains on a GPU only. On a CPU: {ON_CPU}.")
    if fsdp2_loads_on_one_process():
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true with FSDP2: accelerate cannot hand a model's buffers, here "
            "rope_frequencies, to the other processes. Set it to false, as docs/examples/accelerate/fsdp2.yaml does."
        )
    check_output(model, arguments)


def check_output(model: ModelArguments, arguments: RecoveryTrainingArguments) -> None:
    """Raise a `ValueError` if the output folder holds a run or a model that this one would overwrite."""
    output, resumes = Path(arguments.output_dir), wants_resume(arguments)
    state = read_state(output)
    is_run = state is not None or checkpoints(output) or (output / RUN_SETTINGS).is_file()
    if not is_run and (held := next((name for name in OF_MODELS if shown(output, name)), None)):
        raise ValueError(
            f"output_dir={output} holds a model that is no run of this command ({held}), which would be lost. Choose "
            "another --output."
        )
    if resumes and (state is None or find_checkpoint(arguments) or is_finished(arguments, None, model)):
        return
    if state is not None and newest_checkpoint(output) is None:
        whole = output / MERGED if (output / ADAPTER_CONFIG).is_file() else output
        if (whole / "config.json").is_file():
            remedy = f"train on from it by --model {whole} --output NEW"
        else:
            remedy = "merge the adapter (peft's merge_and_unload), which makes a model to train on from"
        raise ValueError(
            f"{output} holds a run that was finished after {state['global_step']} steps and no checkpoint to go on "
            f"from. Give another --output for a new one, or {remedy}."
        )
    if state is not None and lacks_merged(output, model):
        raise ValueError(
            f"{output} holds a run that was finished without its merged model. Add that by --resume_from_checkpoint "
            "true --merge, or choose another --output_dir for a new one."
        )
    if state is not None:
        raise ValueError(
            f"{output} holds a run that was finished after {state['global_step']} steps: there is nothing left to do. "
            "Choose another --output_dir for a new one, or go on with it by --resume_from_checkpoint true and more "
            "steps."
        )
    if checkpoints(output):
        raise ValueError(
            f"{output} holds checkpoints of an earlier run. Go on with it by --resume_from_checkpoint true, or choose "
            "another --output_dir."
        )


def fsdp2_loads_on_one_process() -> bool:
    """Whether `accelerate launch` has been told so; it tells its processes by their environment."""
    asked = {
        name: os.environ.get(name, "").lower() for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    }
    return set(asked.values()) == {"true"} and os.environ.get("FSDP_VERSION") == "2"
