"""Run tasks on the original and its conversions, one model at a time, and keep every result as soon as it is there."""

import logging
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from mha2mla.modeling import CACHE_ARGUMENT, cache_nbytes

from .measures.caches import PLAIN, CacheKind
from .measures.scoring import inference, prefix_token
from .report.tables import write_tables
from .results import ModelResult, Results, describe_environment, describe_model, is_done
from .tasks import EvaluationSettings, Task, measure_task

logger = logging.getLogger(__name__)

PLAIN_TOKENS = 16  # a plain cache takes the same for each
QUANTISED_TOKENS = 1024  # many, so that the window weighs what it does in use
MEASURE_PIECE = 128


def measure_cache(model: PreTrainedModel, token: int, kind: CacheKind = PLAIN) -> float:
    """Bytes of cache per token, of a real cache after real forward passes."""
    cache = kind.make(model)
    num_tokens = PLAIN_TOKENS if kind.nbits is None else QUANTISED_TOKENS
    num_tokens = min(num_tokens, model.config.max_position_embeddings)
    ids = torch.full((1, num_tokens), token, device=model.device)
    with inference(model):
        for part in ids.split(MEASURE_PIECE, dim=1):
            model(part, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    return cache_nbytes(cache) / num_tokens


def suited_caches(path: str, caches: Sequence[CacheKind]) -> list[CacheKind]:
    """Those in which a model's cache can be held; the others are named in the log."""
    config = AutoConfig.from_pretrained(path)
    suited = [kind for kind in caches if kind.suits(config)]
    for kind in caches:
        if kind not in suited:
            logger.info("%s: a cache of a %s model cannot be %s, row left out", path, config.model_type, kind.name)
    return suited


def evaluate_models(
    paths: list[str],
    tasks: list[Task],
    output: Path,
    settings: EvaluationSettings,
    command: str,
    batch_size: int | None = 8,
    device: str = "cpu",
    caches: Sequence[CacheKind] = (PLAIN,),
) -> Results:
    """
    Measure every task that has not been measured yet on every model. results.json is written after each; table.md and
    report.html after each row.

    Args:
        paths (`list[str]`): The original first, then its conversions; folders or names on the Hub.
        output (`Path`): Folder of the results; those in it are continued.
        command (`str`): What the user ran, for the record.
        batch_size (`int`, *optional*, defaults to 8): Items at a time; None looks for a size that fits into memory.
        caches (`Sequence[CacheKind]`): Each gives a row of every model whose cache can be held so.

    Raises:
        ValueError: If the output folder's results have other settings, a cache's backend is not installed, or a task
            cannot be measured; what has been measured until then is kept.
    """
    suited = {path: suited_caches(path, caches) for path in paths}
    results = Results.open(output, settings)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    results.runs.append({"command": command, "started": started, "environment": describe_environment(device)})
    set_seed(settings.seed)
    original: PreTrainedModel | None = None
    original_row: ModelResult | None = None
    keep_original = any(task.kind == "agreement" for task in tasks)
    for path in paths:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=settings.dtype).to(device).eval()
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        for kind in suited[path]:
            size = measure_cache(model, prefix_token(tokenizer), kind)
            row = results.row(describe_model(path, model, kind.name, size, path == paths[0]))
            if original_row is None:
                original_row = row
                original = model if keep_original else None
            for number, task in enumerate(tasks, 1):
                if task.kind == "agreement" and row is original_row:
                    continue  # it agrees with itself
                if task.kind == "harness" and kind != PLAIN:
                    continue  # lm-evaluation-harness reads whole texts, without a cache
                digest = task.digest + (original_row.digest if task.kind == "agreement" else "")
                if is_done(row, task, digest):
                    logger.info("%s, %s: done before", row.label, task.name)
                    continue
                logger.info("%s, %s (task %d of %d)", row.label, task.name, number, len(tasks))
                start = time.perf_counter()
                numbers = measure_task(task, model, tokenizer, original or model, settings, batch_size, kind)
                seconds = round(time.perf_counter() - start, 2)
                row.tasks[task.name] = {"kind": task.kind, "digest": digest, "numbers": numbers, "seconds": seconds}
                row.tasks[task.name]["run"] = len(results.runs) - 1
                results.save(output)
            results.save(output)
            write_tables(output, results)
        del model  # before the next one is loaded
    return results
