"""Measure the speed of models one after another, and write what was found."""

import gc
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from mha2mla.common.device import check_device
from mha2mla.common.files import check_output_file, write_whole
from mha2mla.evaluation.caches import CacheKind
from mha2mla.evaluation.report.figures import encode_png
from mha2mla.modeling import LatentConfigMixin

from .bandwidth import attention_bandwidth, copy_bandwidth
from .measure import Speed, measure_speed
from .tables import plot_speed, speed_table

RESULTS_NAME = "speed.json"

logger = logging.getLogger(__name__)


def measure_speeds(
    makers: Mapping[str, Callable[[], PreTrainedModel]],
    caches: Sequence[CacheKind],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    prefill: bool,
    device: torch.device,
    keep: Callable[[list[Speed], list[dict[str, Any]]], None],
) -> tuple[list[Speed], list[dict[str, Any]]]:
    """
    Every model with every cache that it can have, batch size and context.

    Args:
        makers (`Mapping[str, Callable]`): What loads each model, by its name; one is in memory at a time.
        steps, prefill: See [`measure_speed`].
        keep (`Callable`): Called after each measurement with all that there is so far.

    Returns:
        The speeds, and the bytes a second that the decoding attention of converted models reaches by itself.
    """
    speeds: list[Speed] = []
    shares: list[dict[str, Any]] = []
    bar = tqdm(total=len(makers) * len(batch_sizes) * len(contexts) * len(caches), desc="Speed", unit="measurement")
    for name, make in makers.items():
        bar.set_postfix_str(f"loading {name}")
        model = make()
        config = model.config
        suited = [kind for kind in caches if kind.suits(config)]
        for kind in caches:
            if kind not in suited:
                logger.info("%s: a cache of a %s model cannot be %s, left out", name, config.model_type, kind.name)
        for batch in batch_sizes:
            for context in contexts:
                for kind in suited:
                    bar.set_postfix_str(f"{name}, {kind.name}, batch {batch}, context {context}")
                    speeds.append(measure_speed(model, name, kind, batch, context, steps, prefill=prefill))
                    keep(speeds, shares)
                    bar.update()
                bar.update(len(caches) - len(suited))
                if isinstance(config, LatentConfigMixin):
                    reached = attention_bandwidth(config, batch, context, model.dtype, device)
                    shares.append(dict(model=name, batch=batch, context=context, bytes_per_s=reached))
                    keep(speeds, shares)
        del model  # the next one may need its memory
        gc.collect()
    bar.close()
    return speeds, shares


def bench_models(
    makers: Mapping[str, Callable[[], PreTrainedModel]],
    output: Path,
    command: str,
    caches: Sequence[CacheKind],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    prefill: bool,
    dtype: str,
    device: str,
) -> str:
    """
    [`measure_speeds`], with the copy bandwidth of the same machine. `speed.json` is written into the output folder
    after each measurement, `speed.md` and `speed.png` at the end.

    Returns:
        The table.

    Raises:
        ValueError: If nothing can be written there.
    """
    torch_device = check_device(device)
    check_output_file(output / RESULTS_NAME)
    bandwidth = copy_bandwidth(torch_device)
    on_gpu = torch_device.type == "cuda"
    hardware = torch.cuda.get_device_name(torch_device) if on_gpu else platform.processor() or "CPU"
    versions = f"{hardware}, torch {torch.__version__}, transformers {transformers.__version__}, {dtype}"

    def keep(speeds: list[Speed], shares: list[dict[str, Any]]) -> None:
        results = dict(
            command=command,
            versions=versions,
            copy_bytes_per_s=bandwidth,
            attention=shares,
            speed=[asdict(speed) for speed in speeds],
        )
        write_whole(output / RESULTS_NAME, json.dumps(results, indent=1) + "\n")

    speeds, shares = measure_speeds(makers, caches, batch_sizes, contexts, steps, prefill, torch_device, keep)
    table = speed_table(speeds, f"Speed ({versions})").markdown()
    table += f"\n\nCopy bandwidth: {bandwidth / 1e9:,.1f} GB/s. Decoding attention over the cache reaches:\n"
    for share in shares:
        part = share["bytes_per_s"] / bandwidth
        table += f"- {share['model']}, batch {share['batch']}, context {share['context']}: {part:.1%} of it\n"
    (output / "speed.md").write_text(table, encoding="utf-8")
    (output / "speed.png").write_bytes(encode_png(plot_speed(speeds)))
    return table
