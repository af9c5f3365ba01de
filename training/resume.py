"""Where a run goes on, and whether there is anything left of it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mha2mla.common.adapters import MERGED, RUN_SETTINGS
from mha2mla.common.cards import CARD_NAME
from mha2mla.common.files import damage, read_json_object, shown
from mha2mla.modeling import LatentConfigMixin

from .arguments import DataArguments, ModelArguments
from .data import Rows, data_sources
from .parameters import LORA
from .trainer_arguments import RecoveryTrainingArguments

TRAINER_STATE = "trainer_state.json"  # of a checkpoint, and of an output folder that is complete: written last in both
# Other values of these are other rows, or others in a step, whatever the text is.
OF_ROWS = ("seed", "rows_per_step", "length", "short_lengths", "lookback_share", "streaming")
FACTORS = {"rows_per_step": " product of --per_device_train_batch_size, --gradient_accumulation_steps and processes"}
FIRST = 8  # rows by which a text is known


def wants_resume(arguments: RecoveryTrainingArguments) -> bool:
    return str(arguments.resume_from_checkpoint).lower() not in ("none", "false")


def read_state(folder: Path) -> dict[str, Any] | None:
    """The Trainer's state in a folder; None where there is none, or only half of it."""
    try:
        return json.loads((folder / TRAINER_STATE).read_text())
    except (OSError, ValueError):
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, the newest first."""
    numbered = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.split("-")[-1]), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a killed run may leave one without its state, or with half of it."""
    return next((path for path in checkpoints(folder) if read_state(path) is not None), None)


def find_checkpoint(arguments: RecoveryTrainingArguments) -> str | None:
    """The checkpoint to go on from: with `true` the newest complete one, or none if there is none yet."""
    wanted = arguments.resume_from_checkpoint
    if not wants_resume(arguments):
        return None
    if str(wanted).lower() == "true":
        newest = newest_checkpoint(Path(arguments.output_dir))
        return None if newest is None else str(newest)
    if read_state(Path(wanted)) is None:
        raise ValueError(f"resume_from_checkpoint={wanted!r} holds no {TRAINER_STATE}: it is no complete checkpoint.")
    return str(wanted)


def check_whole(checkpoint: str) -> None:
    """Raise a `ValueError` for a file of a checkpoint that lost its end, as on a disk that was full or lost power."""
    fault = next(filter(None, map(damage, shown(Path(checkpoint), "**/*"))), None)
    if fault is not None:
        raise ValueError(
            f"{fault}, so that no run goes on from {checkpoint}. Remove that folder: --resume_from_checkpoint true "
            "then takes the checkpoint before it."
        )


def all_steps_taken(folder: str | Path, arguments: RecoveryTrainingArguments) -> bool:
    """Whether the checkpoint or output in a folder has come to the end of the run that the arguments describe."""
    state = read_state(Path(folder))
    if state is None:
        return False
    if arguments.max_steps > 0:
        return state["global_step"] >= arguments.max_steps
    return (state["epoch"] or 0) >= arguments.num_train_epochs


def lacks_merged(folder: Path, model: ModelArguments) -> bool:
    """Whether the merged model is asked for and not there, or only in part: its card comes after its weights."""
    return model.merge and not (folder / MERGED / CARD_NAME).is_file()


def is_finished(arguments: RecoveryTrainingArguments, checkpoint: str | None, model: ModelArguments) -> bool:
    """Whether the output folder is complete, and the checkpoint to go on from, if any, leaves no step to take."""
    if lacks_merged(Path(arguments.output_dir), model):
        return False
    left = checkpoint is not None and not all_steps_taken(checkpoint, arguments)
    return not left and all_steps_taken(arguments.output_dir, arguments)


def describe_settings(
    model: ModelArguments, arguments: RecoveryTrainingArguments, config: LatentConfigMixin
) -> dict[str, Any]:
    """The settings by which a checkpoint's weights and optimizer state are of some form and no other."""
    settings: dict[str, Any] = {
        "trainable": model.trainable,
        "attention_learning_rate": arguments.attention_learning_rate,
        "optim": getattr(arguments.optim, "value", arguments.optim),
    }
    if model.trainable == LORA:
        targets = sorted(model.lora_targets or config.attention_projections)
        settings |= {"lora_rank": model.lora_rank, "lora_alpha": model.lora_alpha, "lora_targets": targets}
        settings["model"] = model.model  # a checkpoint has the adapter only
    return settings


def describe_order(data: DataArguments, arguments: RecoveryTrainingArguments) -> dict[str, Any]:
    """The settings by which rows come in one order and no other: a checkpoint is so many steps from the first."""
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    settings = {"seed": arguments.seed, "rows_per_step": rows, **asdict(data)}
    del settings["eval_data"]
    return settings | {"data": settings.pop("data")}  # last: it may be spelled in many ways


def describe_text(data: DataArguments, rows: Rows) -> str:
    """What is the same wherever the text lies and however it is named. Of a stream no row is read for it."""
    if isinstance(rows, Dataset):
        return f"{len(rows)} rows, {crc32(str(rows[:FIRST]).encode()):08x}"
    places = []
    for source in data_sources(data)[0]:
        files = [] if source.builder is None else map(Path, source.files())
        names = ", ".join(f"{file.name} of {file.stat().st_size} bytes" for file in files)
        places.append(f"{source.weight:g} of {names or f'{source}, {source.split}'}")
    return f"{' and '.join(places)}, shuffled by {data.shuffle_buffer}"


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def made_with(checkpoint: str) -> dict[str, Any]:
    """The settings of the run that made a checkpoint, as far as its folder tells."""
    path = Path(checkpoint).resolve().parent / RUN_SETTINGS
    return read_json_object(path) if path.is_file() else {}


def check_settings(checkpoint: str | None, settings: dict[str, Any], remedy: str = "") -> None:
    """Raise a `ValueError` if the run that made a checkpoint had other settings."""
    if checkpoint is None:
        return
    before = made_with(checkpoint)
    for name, value in settings.items():
        theirs = before.get(name)
        # A rate of its own makes attention a group of its own, whatever it is.
        same = (value is None) == (theirs is None) if name == "attention_learning_rate" else value == theirs
        if name == "model":  # a folder that is there no more was moved
            place = Path(str(theirs))
            same = same or (place.is_absolute() and not place.exists())
        if name in before and not same:
            raise ValueError(
                f"{checkpoint} was made with {name}={theirs!r}, this run has {name}={value!r}: it cannot go on from "
                f"there. Give the same{FACTORS.get(name, '')}, or another --output for a new run{remedy}."
            )


def check_order(checkpoint: str | None, order: dict[str, Any], arguments: RecoveryTrainingArguments) -> None:
    """[`check_settings`] of what [`describe_order`] gives, which does not count where no rows are passed over. The
    same `text` may be named in other words; where it differs, the first of them that does tells why."""
    if checkpoint is None or arguments.ignore_data_skip:
        return
    before = made_with(checkpoint)
    same_text = not {"text"} <= before.keys() & order.keys() or before["text"] == order["text"]
    settings = {name: value for name, value in order.items() if name in OF_ROWS or not same_text}
    check_settings(checkpoint, settings, ", or --ignore_data_skip to begin this text at its first row")
