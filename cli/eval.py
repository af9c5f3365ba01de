"""Measure what conversion cost: the original and its conversions side by side.

    mha2mla eval ./my-llama my-llama-mla-31 my-llama-mla-19 --data-dir sets --output results
    mha2mla eval meta-llama/Llama-2-7b-hf llama-2-7b-mla --tasks mmlu,piqa,hellaswag --device cuda --batch-size auto
    mha2mla eval ./my-llama my-llama-mla --data-dir sets --caches plain,int8,int4 --dtype bfloat16
    mha2mla eval ./my-llama my-llama-mla --data-dir sets --tasks wikitext,agreement:wikitext,positions:books --limit 20

A task is the name of a file in --data-dir without .jsonl, measured as its items' form says (multiple choice,
retrieval, perplexity), or a task of lm-evaluation-harness (extra `eval`). The output folder gets results.json,
table.md and report.html; the same command continues a run that was killed.
"""

import shlex
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

from transformers import HfArgumentParser

from mha2mla.evaluation.measures.caches import CacheKind
from mha2mla.evaluation.report.tables import PAGE_NAME, make_tables
from mha2mla.evaluation.run import evaluate_models
from mha2mla.evaluation.tasks import EvaluationSettings, find_tasks


def parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"must be a number of items or auto, got {text!r}")
    return int(text)


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(
        EvaluationSettings, prog="mha2mla eval", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="The original, then its conversions: folders, or names on the Hub.")
    parser.add_argument("--data-dir", type=Path, help="Folder of .jsonl files of items; a file's name is its task.")
    parser.add_argument("--tasks", help="Tasks, with commas between them; all files of --data-dir if not given.")
    parser.add_argument("--output", type=Path, default=Path("evaluation-results"), help="Folder of the results.")
    parser.add_argument("--batch-size", type=parse_batch_size, default=8, help="Items at a time, or auto.")
    parser.add_argument(
        "--caches",
        default="plain",
        help="How the cache is held, a row each: plain, int8, int4, int2; with a backend before it (quanto-int4, "
        "hqq-int4) or the model's own, which for the original is quanto, and hqq for int8.",
    )
    parser.add_argument("--device", default="cpu")
    args = vars(parser.parse_args(argv))
    models, data_dir, names, output, batch_size, caches, device = (
        args.pop(k) for k in ("models", "data_dir", "tasks", "output", "batch_size", "caches", "device")
    )
    settings = EvaluationSettings(**args)
    kinds = [CacheKind.parse(name) for name in dict.fromkeys(caches.split(","))]
    tasks = find_tasks(names.split(",") if names else None, data_dir, settings.limit)
    command = shlex.join(["mha2mla", "eval", *argv])
    results = evaluate_models(models, tasks, output, settings, command, batch_size, device, kinds)
    print("\n\n".join(table.markdown() for table in make_tables(results)))
    print(f"\nWrote {output / PAGE_NAME}")
