"""Tasks of lm-evaluation-harness by their own names: a thin adapter around the optional package (extra `eval`)."""

from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.common.extras import installing

from .scoring import check_finite

# Their names of what our own tables show.
METRICS = {
    "acc,none": "accuracy",
    "acc_stderr,none": "stderr",
    "acc_norm,none": "accuracy_norm",
    "acc_norm_stderr,none": "stderr_norm",
}


@cache
def harness_task_names() -> frozenset[str]:
    """All names that lm-evaluation-harness knows; it reads thousands of files for them, so they are kept."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)


def require_harness_task(name: str) -> None:
    """A `ValueError` unless lm-evaluation-harness is installed and knows the task."""
    try:
        names = harness_task_names()
    except ImportError:
        raise ValueError(
            f"If {name} is a task of lm-evaluation-harness, install that: {installing('eval')}."
        ) from None
    if name not in names:
        raise ValueError(f"lm-evaluation-harness has no task {name!r} (`lm_eval ls tasks` lists what it has).")


def measure_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | dict,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Run a task of lm-evaluation-harness on a loaded model, with the task's own settings.

    Args:
        task (`str` or `dict`): Name of a task, group or tag, or a task's configuration. Its data comes from the Hub.
        limit (`int`, *optional*): Items at most, of each task of a group.
        seed (`int`, *optional*, defaults to 0): Of the few-shot examples and of everything else that is drawn.

    Returns:
        Every number that the harness reports, under its name, and accuracies under ours as well ("accuracy",
        "accuracy_norm", "stderr", "stderr_norm"). Its "acc_norm" divides by characters, ours by bytes. A tag has no
        numbers of its own: those of its tasks, each behind the task's name.

    Raises:
        ValueError: If logits are not finite, of which the harness makes accuracies all the same.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    seeds = dict(random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
    name = task if isinstance(task, str) else task["task"]

    def check(module, inputs, made) -> None:
        check_finite(made.logits.amax(), f"{name}: the logits")  # NaN where any is, and it takes no memory

    hook = model.register_forward_hook(check)
    try:
        output = simple_evaluate(
            model=harness, tasks=[task], limit=limit, log_samples=False, bootstrap_iters=1000, **seeds
        )
    finally:
        hook.remove()
    return collect_numbers(output["results"], name)


def collect_numbers(results: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    """The numbers of a task or group, or, of a tag, those of all its tasks."""
    if name not in results:
        return {
            f"{task} {key}": value
            for task, of_task in results.items()
            for key, value in of_task.items()
            if isinstance(value, int | float)
        }
    numbers = {key: value for key, value in results[name].items() if isinstance(value, int | float)}
    return numbers | {ours: numbers[theirs] for theirs, ours in METRICS.items() if theirs in numbers}
