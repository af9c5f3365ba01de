"""The results file: what was measured, on what, with what. Written after every task, so that a killed run goes on."""

import hashlib
import json
import math
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mha2mla.common.files import check_output_file, read_json_object, shown, write_whole
from mha2mla.common.loading import find_file
from mha2mla.common.records import recorded_preset
from mha2mla.common.versions import versions

from .caches import DYNAMIC
from .settings import EvaluationSettings
from .tasks import Task

RESULTS_NAME = "results.json"
ORIGINAL = "original"
PACKAGES = ("mha2mla", "torch", "transformers", "datasets", "lm_eval")


@dataclass
class ModelResult:
    """
    A row of the tables.

    Attributes:
        name (`str`): "original", or the folder's name.
        path (`str`): Folder, or name on the Hub.
        preset (`str`): Of the conversion, or "original"; "other" where there is no record of it.
        cache (`str`): Name of the [`CacheKind`]: "dynamic", "int4", ...
        digest (`str`): Of the checkpoint, by which a continued run sees that it changed.
        cache_bytes_per_token (`float`): Measured on a real cache.
        dtype (`str`): Of the weights.
        num_parameters (`int`): In all.
        tasks (`dict`): By name: "kind", "digest", "numbers", "seconds", and "run", an index into the file's runs.
    """

    name: str
    path: str
    preset: str
    cache: str
    digest: str
    cache_bytes_per_token: float
    dtype: str
    num_parameters: int
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name in tables and pictures."""
        return self.name if self.cache == DYNAMIC.name else f"{self.name}, {self.cache}"

    def is_of(self, path: str) -> bool:
        """Whether it is of a folder or a name on the Hub. A folder that is not there any more was moved, or was named
        from another one: its weights tell."""
        if self.path == path or Path(self.path).resolve() == Path(path).resolve():
            return True
        return not Path(self.path).exists() and self.digest == checkpoint_digest(path)


@dataclass
class Results:
    """
    Attributes:
        settings (`dict`): Of [`EvaluationSettings`]; the same for all runs.
        runs (`list[dict]`): Command, time and environment of every run that wrote into the file.
        models (`list[ModelResult]`): In the order of the tables.
    """

    settings: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    models: list[ModelResult] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, settings: EvaluationSettings) -> "Results":
        """
        Those in the folder, to be continued, or new ones.

        Raises:
            ValueError: If the folder's were measured with other settings, or nothing can be written there.
        """
        path, another = folder / RESULTS_NAME, "Choose another --output."
        check_output_file(path)
        if not path.is_file():
            return cls(asdict(settings))
        content = read_json_object(path)
        kinds = {"settings": dict, "runs": list, "models": list}
        if missing := [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]:
            raise ValueError(f"{path} has no {missing[0]}: `mha2mla eval` did not write it. {another}")
        changed = {k: v for k, v in asdict(settings).items() if content["settings"].get(k) != v}
        if changed:
            before = {name: content["settings"].get(name) for name in changed}
            raise ValueError(f"{path} was measured with {before}, now asked for {changed}. {another}")
        try:
            models = [ModelResult(**model) for model in content["models"]]
        except TypeError as error:
            raise ValueError(f"{path} has a model that `mha2mla eval` did not write ({error}). {another}") from None
        return cls(content["settings"], content["runs"], models)

    def check_original(self, folder: Path, path: str | None) -> None:
        """Raise a `ValueError` if the rows would be compared with another original than a run's own, which is None
        where that has none."""
        for model in self.models:
            if model.preset == ORIGINAL and (path is None or not model.is_of(path)):
                raise ValueError(
                    f"The results in {folder} were measured against {model.path}, and now the original is "
                    f"{path or 'not named'}. Choose another --output, or name {model.path} first."
                )

    def save(self, folder: Path) -> None:
        """Write the file whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(without_nan(asdict(self)), indent=2, ensure_ascii=False)
        write_whole(folder / RESULTS_NAME, text + "\n")

    def row(self, fresh: ModelResult) -> ModelResult:
        """The row of a model: the one already there, with its tasks, unless the checkpoint has changed since."""
        for index, model in enumerate(self.models):
            if model.is_of(fresh.path) and model.cache == fresh.cache:
                if (model.digest, model.dtype) == (fresh.digest, fresh.dtype):
                    fresh.tasks = model.tasks
                self.models[index] = fresh
                return fresh
        self.models.append(fresh)
        return fresh


def is_done(row: ModelResult, task: Task, digest: str) -> bool:
    """Whether a row holds the task's numbers, for the same items."""
    return task.name in row.tasks and row.tasks[task.name]["digest"] == digest


def without_nan(value: Any) -> Any:
    """NaN and infinity are not JSON: null stands for them."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checkpoint_digest(path: str) -> str:
    """Changes when the checkpoint does: from the Hub its commit; of a folder the config's text, and the sizes and
    times of its files of weights."""
    folder = Path(path)
    if not folder.is_dir():
        config = find_file(path, "config.json")
        return "" if config is None else config.parent.name  # snapshots/COMMIT
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in shown(folder):
        if file.suffix in (".safetensors", ".bin"):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def describe_model(
    path: str, name: str, model: PreTrainedModel, cache: str, cache_bytes_per_token: float, is_original: bool
) -> ModelResult:
    """A row without tasks."""
    return ModelResult(
        name=ORIGINAL if is_original else name,
        path=path,
        preset=ORIGINAL if is_original else recorded_preset(path) or "other",
        cache=cache,
        digest=checkpoint_digest(path),
        cache_bytes_per_token=cache_bytes_per_token,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, commit and hardware of this run."""
    on_gpu = device.startswith("cuda")
    return {
        "versions": {"python": platform.python_version()} | versions(*PACKAGES),
        "commit": git_commit(Path(__file__).parent),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that this code lies in, "-dirty" behind it if files were changed; None where it is
    installed from a wheel."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.stdout.strip()
