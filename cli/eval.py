"""Measure what conversion cost: the original and its conversions side by side.

    mha2mla eval ./my-llama my-llama-mla-31 my-llama-mla-19 --data sets --output results
    mha2mla eval ./my-llama my-llama-mla --data wikitext.jsonl --column raw --cards
    mha2mla eval meta-llama/Llama-2-7b-hf llama-2-7b-mla --tasks mmlu,piqa,hellaswag --device cuda --batch-size auto
    mha2mla eval ./my-llama my-llama-mla --data sets --caches dynamic,int8,int4 --dtype bfloat16
    mha2mla eval ./my-llama my-llama-mla --data sets --tasks wikitext,agreement:wikitext,positions:books --limit 20
    mha2mla eval ./my-llama my-llama-mla --tasks long:passkey,long:needles,long:questions --contexts 1024,4096

A task is the name of a file in --data without .jsonl, measured as its items' form says (multiple choice, retrieval,
perplexity), one of long context that is generated (long:NAME), or a task of lm-evaluation-harness (extra `eval`). The
output folder gets results.json, table.md and report.html, with pictures of what each conversion did; the same command
continues a run that was killed.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from mha2mla.evaluation.settings import EvaluationSettings

from .parsing import COMPARED_MODELS, Names, Sizes, parse


@dataclass
class EvalArguments:
    """What is measured, and where the results go."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder of .jsonl files of items, a file's name being its task; one such file; or text: a .txt, "
            ".jsonl.gz or .parquet file, or OWNER/NAME on the Hub."
        },
    )
    column: str = field(default="text", metadata={"help": "Column of the text, where items are text."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub, if any."})
    split: str = field(default="train", metadata={"help": "Split of a data set on the Hub."})
    tasks: Names | None = field(default=None, metadata={"help": "With commas; if not given, all that --data has."})
    output: Path = field(default=Path("evaluation-results"), metadata={"help": "Folder of the results."})
    contexts: Sizes = field(
        default=Sizes("1024"), metadata={"help": "Tokens of the prompts of `long:` tasks, with commas."}
    )
    batch_size: str = field(default="8", metadata={"help": "Items at a time, or auto."})
    caches: Names = field(
        default=Names("dynamic"),
        metadata={
            "help": "How the cache is held, a row each, with commas: dynamic, int8, fp8, int4, int2; with a backend "
            "before an int (latent-, quanto-, hqq-) or the model's own, which for the original is quanto, and hqq for "
            "int8; vllm-fp8, what vLLM's fp8 cache gives back (its kernels may round more)."
        },
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    cards: bool = field(
        default=False, metadata={"help": "Put tables and pictures into the model cards of the conversions, too."}
    )
    benchmarks: Names | None = field(
        default=None,
        metadata={
            "help": "Write accuracies for the Hub's leaderboards into the conversions' folders (.eval_results), with "
            "commas: TASK=OWNER/NAME:TASK_ID, the data set there and the task in its eval.yaml."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that models bring along."})

    def __post_init__(self):
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise ValueError(f"batch_size must be a number of items or auto, got {self.batch_size!r}.")


def main(argv: list[str]) -> None:
    options, settings, given = parse(
        argv,
        "mha2mla eval",
        EvalArguments,
        EvaluationSettings,
        description=__doc__,
        positionals=COMPARED_MODELS,
    )

    from mha2mla.evaluation.caches import CacheKind
    from mha2mla.evaluation.report.card import write_cards
    from mha2mla.evaluation.report.every_table import make_tables
    from mha2mla.evaluation.report.headline import results_in_words
    from mha2mla.evaluation.report.hub_results import Benchmark, check_benchmarks, write_hub_results
    from mha2mla.evaluation.report.page import PAGE_NAME
    from mha2mla.evaluation.run import evaluate_models
    from mha2mla.evaluation.tasks import TaskData, find_tasks

    caches = [CacheKind.parse(name) for name in dict.fromkeys(options.caches)]
    data = TaskData(options.data, options.column, options.subset, options.split)
    tasks = find_tasks(options.tasks, data, settings.limit, options.contexts, settings.seed)
    benchmarks = [Benchmark.parse(text) for text in options.benchmarks or ()]
    check_benchmarks(benchmarks, tasks, settings.limit)
    results = evaluate_models(
        given.models,
        tasks,
        options.output,
        settings,
        shlex.join(["mha2mla", "eval", *argv]),
        None if options.batch_size == "auto" else int(options.batch_size),
        options.device,
        caches,
        options.trust_remote_code,
    )
    if options.cards:
        write_cards(results)
    write_hub_results(results, benchmarks)
    print("\n\n".join([*(table.markdown() for table in make_tables(results)), *results_in_words(results)]))
    print(f"\nWrote {options.output / PAGE_NAME}")
