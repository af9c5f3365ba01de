"""Run tasks on the original and its conversions, one model at a time, and keep every result as soon as it is there."""

import logging
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from mha2mla.common.device import check_device
from mha2mla.common.loading import (
    check_router,
    distinct_names,
    keys_values_width,
    load_config,
    load_model,
    load_tokenizer,
    plain_path,
)
from mha2mla.common.records import RECORD_NAME, read_record, recorded_preset
from mha2mla.modeling import CACHE_ARGUMENT, cache_nbytes

from .caches import DYNAMIC, VLLM, CacheKind, check_suited
from .engine_cache import engine_fp8_nbytes
from .measures.scoring import inference, prefix_token
from .progress import Progress
from .report.conversion import find_records
from .report.page import write_page
from .results import ModelResult, Results, describe_environment, describe_model, is_done
from .settings import EvaluationSettings
from .tasks import Task, check_lengths, check_prompts, check_tables, check_tokens, measure_task
from .windows import count_read, only_read

logger = logging.getLogger(__name__)

DYNAMIC_TOKENS = 16  # a dynamic cache takes the same for each
QUANTISED_TOKENS = 1024  # many, so that the window weighs what it does in use
MEASURE_PIECE = 128


def measure_cache(model: PreTrainedModel, token: int, kind: CacheKind = DYNAMIC) -> float:
    """Bytes of cache per token, of a real cache after real forward passes."""
    cache = kind.make(model)
    num_tokens = QUANTISED_TOKENS if kind.has_window else DYNAMIC_TOKENS
    num_tokens = min(num_tokens, model.config.max_position_embeddings)
    ids = torch.full((1, num_tokens), token, device=model.device)
    with inference(model):
        for part in ids.split(MEASURE_PIECE, dim=1):
            model(part, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    size = cache_nbytes(cache)
    return (engine_fp8_nbytes(size, cache) if kind.backend == VLLM else size) / num_tokens


def suited_caches(path: str, config: PreTrainedConfig, caches: Sequence[CacheKind]) -> list[CacheKind]:
    """Those in which a model's cache can be held; the others are named in the log."""
    check_router(config, path, "model")  # now, not when the models before it have been measured
    suited = [kind for kind in caches if kind.suits(config)]
    for kind in caches:
        if kind not in suited:
            logger.info("%s: a cache of a %s model cannot be %s, row left out", path, config.model_type, kind.name)
    return suited


def find_original(paths: Sequence[str]) -> str | None:
    """
    What the conversions are compared with: the first model, unless it is a conversion itself. Then it is the source of
    that one, if it lies on this machine.
    """
    if recorded_preset(paths[0]) is None:
        return paths[0]
    record = read_record(paths[0])
    source = record.get("source")
    if not isinstance(source, str):
        raise ValueError(f"{RECORD_NAME} of {paths[0]} has no 'source': convert again, or remove the file.")
    if not Path(source).is_dir():
        logger.info("%s is a conversion of %s, which is not here: there is no original", paths[0], source)
        return None
    if differs := other_field(record, load_config(paths[0]), source):
        logger.warning(
            "%s is a conversion of %s, and what lies there from here has another %s: there is no original. Give its "
            "path first.",
            paths[0],
            source,
            differs,
        )
        return None
    logger.info("%s is a conversion of %s, which is measured as the original", paths[0], source)
    return source


def other_field(record: dict[str, Any], config: PreTrainedConfig, source: str) -> str | None:
    """What tells that the model in a folder is not the one that a conversion was made of; None if nothing does. The
    record has the path as it was typed, and from another folder that may be another model's."""
    found = load_config(source, "source")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(found, name, None) != getattr(config, name):
            return name
    width = keys_values_width(found)
    return None if record.get("source_cache_width", width) == width else "cache"


def is_measured(task: Task, kind: CacheKind, is_original: bool) -> bool:
    """Whether a task says something of a row; `is_original` is that of the original with its plain cache."""
    if task.kind == "agreement":
        return not is_original  # it agrees with itself
    return task.kind != "harness" or kind == DYNAMIC  # lm-evaluation-harness reads whole texts, without a cache


def evaluate_models(
    paths: Sequence[str],
    tasks: Sequence[Task],
    output: Path,
    settings: EvaluationSettings,
    command: str,
    batch_size: int | None = 8,
    device: str = "cpu",
    caches: Sequence[CacheKind] = (DYNAMIC,),
    trust_remote_code: bool = False,
) -> Results:
    """
    Measure every task that has not been measured yet on every model. results.json is written after each; table.md and
    report.html after each row.

    Args:
        paths (`Sequence[str]`): The original first, then its conversions; folders or names on the Hub. Without an
            original it is looked for by [`find_original`].
        output (`Path`): Folder of the results; those in it are continued.
        command (`str`): What the user ran, for the record.
        batch_size (`int`, *optional*, defaults to 8): Items at a time; None looks for a size that fits into memory.
        caches (`Sequence[CacheKind]`): Each gives a row of every model whose cache can be held so; no static ones.
        trust_remote_code (`bool`): Whether code that models bring along may run.

    Raises:
        ValueError: If the output folder's results have other settings or another original, a cache's backend is not
            installed, no cache suits, or a task cannot be measured; what has been measured until then is kept.
    """
    check_device(device)
    for kind in caches:
        if kind.is_static:
            raise ValueError(
                f"--caches {kind.name}: a static cache changes how fast a model is, not what it says. `mha2mla bench` "
                "measures it."
            )
    caches = sorted(caches, key=lambda kind: kind != DYNAMIC)  # what the others are compared with is measured first
    paths = [plain_path(path) for path in paths]
    original_path = find_original(paths)
    compares = [task.name for task in tasks if task.kind == "agreement"]
    if compares and original_path is None:
        raise ValueError(f"{compares[0]} compares with the original, which is not here. Name it before {paths[0]}.")
    paths = list(dict.fromkeys([*([original_path] if original_path else []), *paths]))
    find_records(paths)  # one that is malformed shows before anything is measured
    configs = {path: load_config(path, trust_remote_code=trust_remote_code) for path in paths}
    check_suited(caches, configs.values())
    suited = {path: suited_caches(path, config, caches) for path, config in configs.items()}
    if compares and original_path is not None and not suited[original_path]:
        raise ValueError(
            f"{compares[0]} compares with the original, and --caches {','.join(kind.name for kind in caches)} leaves "
            "that out: its cache cannot be held so. Add dynamic."
        )
    for path, config in configs.items():
        check_lengths(path, config.max_position_embeddings, tasks, settings)
    # Before anything is measured, too.
    tokenizers = {path: load_tokenizer(path, trust_remote_code=trust_remote_code) for path in paths}
    for path, tokenizer in tokenizers.items():
        check_prompts(tasks, tokenizer)
        check_tokens(path, configs[path].vocab_size, tasks, tokenizer)
        check_tables(configs[path], tasks, settings, suited[path], tokenizer)
    results = Results.open(output, settings)
    results.check_original(output, original_path)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    others = [row.path for row in results.models if not any(map(row.is_of, paths))]
    names = distinct_names([*paths, *others])
    results.runs.append({"command": command, "started": started, "environment": describe_environment(device)})
    set_seed(settings.seed)
    original: PreTrainedModel | None = None
    original_row: ModelResult | None = None
    tasks_of = {
        (path, kind): [t for t in tasks if is_measured(t, kind, path == original_path and kind == suited[path][0])]
        for path in paths
        for kind in suited[path]
    }
    progress = Progress(task.name for chosen in tasks_of.values() for task in chosen)
    for path in paths:
        model = load_model(path, trust_remote_code=trust_remote_code, dtype=settings.dtype).to(device).eval()
        tokenizer = tokenizers[path]
        for kind in suited[path]:
            size = measure_cache(model, prefix_token(tokenizer), kind)
            row = results.row(describe_model(path, names[path], model, kind.name, size, path == original_path))
            if path == original_path and original_row is None:
                original_row = row
                original = model if compares else None
            for task in tasks_of[path, kind]:
                digest = task.digest
                if task.kind == "agreement":
                    assert original_row is not None
                    digest += original_row.digest
                if is_done(row, task, digest):
                    logger.info("%s, %s: done before", row.label, task.name)
                    progress.done(task.name, row.tasks[task.name]["seconds"])
                    continue
                logger.info("%s, %s (%s)", row.label, task.name, progress.describe())
                start = time.perf_counter()
                numbers = count_read(task, tokenizer, settings, kind, configs[path])
                if numbers.get("num_read") != 0:  # or what would be measured is a cache in full precision
                    numbers |= measure_task(task, model, tokenizer, original or model, settings, batch_size, kind)
                    numbers = only_read(numbers, task, settings)
                seconds = round(time.perf_counter() - start, 2)
                row.tasks[task.name] = {"kind": task.kind, "digest": digest, "numbers": numbers, "seconds": seconds}
                progress.done(task.name, seconds)
                row.tasks[task.name]["run"] = len(results.runs) - 1
                results.save(output)
            results.save(output)
            write_page(output, results)
        del model  # before the next one is loaded
    return results
