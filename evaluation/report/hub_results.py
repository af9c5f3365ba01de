"""Results in the Hub's own form, `.eval_results/*.yaml`, which it shows on a model's page and counts on leaderboards.

https://huggingface.co/docs/hub/eval-results
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from mha2mla.common.cards import RESULTS_FOLDER
from mha2mla.common.outputs import own_files
from mha2mla.evaluation.caches import DYNAMIC
from mha2mla.evaluation.results import ORIGINAL, Results
from mha2mla.evaluation.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """
    What a task is called on the Hub.

    Attributes:
        task (`str`): Our name of it.
        dataset (`str`): The data set that has the leaderboard, OWNER/NAME.
        task_id (`str`): One of the tasks in that data set's eval.yaml.
    """

    task: str
    dataset: str
    task_id: str

    @classmethod
    def parse(cls, text: str) -> "Benchmark":
        """From `TASK=OWNER/NAME:TASK_ID`; a `ValueError` for anything else."""
        task, _, place = text.partition("=")
        dataset, _, task_id = place.partition(":")
        if not task or not task_id or dataset.count("/") != 1:
            raise ValueError(
                f"--benchmarks {text}: write TASK=OWNER/NAME:TASK_ID, the data set on the Hub that has the "
                "leaderboard, and the task in its eval.yaml."
            )
        return cls(task, dataset, task_id)


def check_benchmarks(benchmarks: Iterable[Benchmark], tasks: Iterable[Task], limit: int | None) -> None:
    """A `ValueError` if a benchmark's task is not measured, has no accuracy, or is measured in part only."""
    kinds = {task.name: task.kind for task in tasks}
    for benchmark in benchmarks:
        if limit is not None:
            raise ValueError(f"--benchmarks {benchmark.task} wants the whole set: leave out --limit {limit}.")
        if kinds.get(benchmark.task) not in ("choice", "harness"):
            raise ValueError(f"--benchmarks {benchmark.task}: that is no task of this run that has an accuracy.")


def write_hub_results(results: Results, benchmarks: Iterable[Benchmark]) -> None:
    """Write the accuracies in per cent into `.eval_results` in the folder of every conversion on this machine."""
    benchmarks = list(benchmarks)
    for model in results.models:
        if model.preset == ORIGINAL or model.cache != DYNAMIC.name or not Path(model.path).is_dir():
            continue
        for benchmark in benchmarks:
            task = model.tasks.get(benchmark.task)
            if task is None or "accuracy" not in task["numbers"]:
                logger.info("%s, %s: no accuracy was measured, nothing for the Hub", model.label, benchmark.task)
                continue
            entry = EvalResultEntry(
                dataset_id=benchmark.dataset,
                task_id=benchmark.task_id,
                value=round(100 * task["numbers"]["accuracy"], 2),
                date=results.runs[task["run"]]["started"][:10],
                notes=f"accuracy in % by log-likelihood, {model.dtype}, mha2mla eval",
            )
            file = Path(model.path) / RESULTS_FOLDER / (benchmark.task.replace(":", "-") + ".yaml")
            file.parent.mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            file.write_text(text, encoding="utf-8")
            own_files(Path(model.path), [file.relative_to(model.path).as_posix()])
            logger.info("Wrote %s", file)
