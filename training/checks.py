"""What can be found wrong before weights are read: minutes earlier than the model would find it."""

import json
import os
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_peft_available

from mha2mla.modeling import MLALlamaConfig

from .arguments import DataArguments, LossArguments, ModelArguments, RecoveryTrainingArguments
from .parameters import LORA, check_lora_targets, freeze_except, meta_model

TRAINER_STATE = "trainer_state.json"


def load_config(path: str, role: str) -> PreTrainedConfig:
    """The config of a checkpoint; a local folder that is not there is not looked for on the Hub."""
    if not Path(path).is_dir() and (Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise ValueError(f"{role}: there is no folder {path!r}, and a name on the Hub has the form OWNER/NAME.")
    return AutoConfig.from_pretrained(path)


def check_model(model: ModelArguments, loss: LossArguments, length: int) -> PreTrainedConfig:
    """
    Raises:
        ValueError: If the checkpoint is not converted, its context is shorter than a row, or what is to be trained is
            not there; tried on the model without its weights.
    """
    config = load_config(model.model, "model")
    if config.model_type != "mla_llama":
        raise ValueError(
            f"{model.model} has model_type={config.model_type!r}: it is not converted. Run `mha2mla convert` first, "
            "and train what it writes."
        )
    assert isinstance(config, MLALlamaConfig)
    if length > config.max_position_embeddings:
        raise ValueError(f"length={length} is more than the model's context, {config.max_position_embeddings}.")
    empty = meta_model(config)
    if model.trainable == LORA:
        if not is_peft_available():
            raise ValueError("trainable='lora' needs peft: pip install 'mha2mla[train]'.")
        check_lora_targets(empty, model.lora_targets)
        trained = [name for name, _ in empty.named_modules() if name.rsplit(".", 1)[-1] in model.lora_targets]
    else:
        freeze_except(empty, model.trainable)
        trained = [name for name, parameter in empty.named_parameters() if parameter.requires_grad]
    check_objective(trained, loss)
    return config


def check_objective(trained: list[str], loss: LossArguments) -> None:
    outside = [name for name in trained if ".self_attn." not in name]
    if loss.objective == "attention" and outside:
        raise ValueError(
            f"objective='attention' gives a gradient to attention only, but {outside[0]} would be trained too. Say "
            "--trainable self_attn, or --trainable lora with targets in attention."
        )


def check_teacher(
    teacher: str, loss: LossArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """
    Raises:
        ValueError: If the teacher has other tokens than the student, or, for the matching of attention, another shape.
    """
    other = load_config(teacher, "teacher")
    if other.vocab_size != config.vocab_size:
        raise ValueError(
            f"The teacher {teacher} has vocab_size={other.vocab_size}, the model {config.vocab_size}: their "
            "predictions cannot be compared. Give the model that was converted."
        )
    if AutoTokenizer.from_pretrained(teacher).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"The tokenizer of the teacher {teacher} differs from the model's. Give the model's source.")
    if loss.objective == "attention":
        for field in ("num_hidden_layers", "hidden_size", "head_dim"):
            if getattr(other, field) != getattr(config, field):
                raise ValueError(
                    f"objective='attention': the teacher has {field}={getattr(other, field)}, the model "
                    f"{getattr(config, field)}. Give the model that was converted."
                )


def check_run(
    model: ModelArguments, loss: LossArguments, data: DataArguments, arguments: RecoveryTrainingArguments
) -> None:
    """
    Raises:
        ValueError: If the settings of the run do not go together, or its folder holds another run.
    """
    if not arguments.output_dir:
        raise ValueError("Give --output_dir, the folder for checkpoints and the trained model.")
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
    if loss.objective == "attention" and (arguments.fsdp or arguments.deepspeed):
        raise ValueError("objective='attention' calls layers one by one, which sharding cannot follow. Use plain DDP.")
    if fsdp2_loads_on_one_process():
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true with FSDP2: accelerate cannot hand a model's buffers, here "
            "rope_frequencies, to the other processes. Set it to false, as docs/examples/accelerate/fsdp2.yaml does."
        )
    if not wants_resume(arguments) and any(Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(
            f"{arguments.output_dir} holds checkpoints of an earlier run. Go on with it by --resume_from_checkpoint "
            "true, or choose another --output_dir."
        )


def fsdp2_loads_on_one_process() -> bool:
    """Whether `accelerate launch` has been told so; it tells its processes by their environment."""
    asked = {
        name: os.environ.get(name, "").lower() for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    }
    return set(asked.values()) == {"true"} and os.environ.get("FSDP_VERSION") == "2"


def wants_resume(arguments: RecoveryTrainingArguments) -> bool:
    return str(arguments.resume_from_checkpoint).lower() not in ("none", "false")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. The state is written last: a killed run may leave one without it, or half."""
    numbered = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((path / TRAINER_STATE).read_text())
            return path
        except (OSError, json.JSONDecodeError):
            continue
    return None


def find_checkpoint(arguments: RecoveryTrainingArguments) -> str | None:
    """The checkpoint to go on from: with `true` the newest complete one, or none if there is none yet."""
    wanted = arguments.resume_from_checkpoint
    if not wants_resume(arguments):
        return None
    if str(wanted).lower() == "true":
        newest = newest_checkpoint(Path(arguments.output_dir))
        return None if newest is None else str(newest)
    if not (Path(wanted) / TRAINER_STATE).is_file():
        raise ValueError(f"resume_from_checkpoint={wanted!r} holds no {TRAINER_STATE}: it is no complete checkpoint.")
    return str(wanted)
