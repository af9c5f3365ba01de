"""What recovery fine-tuning gives: validation loss, multiple-choice accuracy and throughput against tokens.

    python benchmarks/recovery.py tokens SmolLM2-135M-Instruct 'train-*.jsonl.gz' train.npz --length 2048
    python benchmarks/recovery.py tokens SmolLM2-135M-Instruct validation.jsonl.gz validation.npz --length 2048
    python benchmarks/recovery.py run results.jsonl --source SmolLM2-135M-Instruct --rows train.npz \\
        --eval-rows validation.npz --sets ../shared/data/eval --model calibrated-31=mla-31 --model paper-31=paper-31 \\
        --trainable all attention lora --distillation 0 1 --tokens 5e6 20e6 78e6 -- --bf16 --compile_layers \\
        --attn_implementation flex_attention --per_device_train_batch_size 16
    python benchmarks/recovery.py table results.jsonl --plot recovery.png

A row of the table is a run of its own, with its own decay, from the converted checkpoint. The original model, measured
untrained and trained in full on the same tokens by the same Trainer, is the control, for quality and throughput alike.
Rows that are in the results file are not run again, and with --work a stopped row goes on from its last checkpoint, so
that several sessions can share the work; --workers runs rows side by side (their rates mean nothing then), with --wait
those first whose models are there, while others are converted. Behind `--` stand arguments of `mha2mla train`. Neither
`run` nor `tokens` needs the `datasets` library.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, pairwise, product
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from conversion_ablation import read_blocks
from muon import use_muon
from recovery_rows import TokenRows, write_tokens
from recovery_table import ORIGINAL, SETS, Run, read_results, write_table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

import mha2mla.modeling  # noqa: F401  # registers the family
from mha2mla.cli.train import parse_arguments
from mha2mla.evaluation import (
    MultipleChoice,
    choice_bytes,
    measure_perplexity,
    preference_error,
    read_items,
    score_choices,
)
from mha2mla.training import RecoveryTrainer, pack_documents, recover
from mha2mla.training.loss import token_losses
from mha2mla.training.losses.distillation import Distillation
from mha2mla.training.packing import IGNORED, collate_packed, packed_inputs, tokenize
from mha2mla.training.resume import find_checkpoint
from mha2mla.training.trainer import compile_layers, prepare_model, token_perplexity


def plan_runs(args: argparse.Namespace) -> Iterator[tuple[Run, str]]:
    """Every row and the folder of its model: untrained ones first, the control, then the conversions."""
    models = dict(named.split("=", 1) for named in args.model)
    for name, folder in {ORIGINAL: args.source, **models}.items():
        yield Run(name, "none", 0.0, 0), folder
    budgets = [round(float(tokens)) for tokens in args.tokens]
    for tokens in budgets:
        yield Run(ORIGINAL, "all", 0.0, tokens), args.source
    for (name, folder), trainable, distillation, tokens in product(
        models.items(), args.trainable, args.distillation, budgets
    ):
        yield Run(name, trainable, distillation, tokens), folder


def train(run: Run, folder: str, args: argparse.Namespace, output: str) -> RecoveryTrainer:
    """One run; `tokens` of 0 train nothing and measure the checkpoint as it is."""
    rows, eval_rows = TokenRows(args.rows, seed=args.order), TokenRows(args.eval_rows)
    common = ["--model", folder, "--data", str(args.rows), "--output_dir", output]
    if args.work:
        common += ["--save_strategy", "steps", "--save_total_limit", "1", "--resume_from_checkpoint", "true"]
    else:
        common += ["--save_strategy", "no"]
    distil = []
    if run.distillation:
        weights = "--distillation_weight", str(run.distillation), "--hidden_weight", str(args.hidden_weight)
        distil = ["--teacher", args.source, *weights]
    chosen = ["--trainable", run.trainable] if run.tokens else []
    model_args, loss, _, training = parse_arguments([*common, *distil, *chosen, "--max_steps", "1", *args.arguments])
    per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    training.max_steps = max(1, round(run.tokens / (per_step * rows[0]["input_ids"].size)))
    set_seed(training.seed)
    if args.muon:
        use_muon(*args.muon)

    def load(path: str, dtype: str) -> torch.nn.Module:
        attention = model_args.attn_implementation
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)

    student, teacher = load(folder, model_args.dtype), None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not run.tokens:
        prepared = prepare_model(student, None, model_args, loss)
        measure = dict(eval_dataset=eval_rows, data_collator=collate_packed, compute_metrics=token_perplexity)
        trainer = RecoveryTrainer(prepared, training, processing_class=tokenizer, **measure)
        trainer.evaluate()
        return trainer
    if distil:
        teacher = load(args.source, "bfloat16" if training.bf16 else model_args.dtype)
    return recover(student, tokenizer, rows, eval_rows, model_args, loss, training, teacher, find_checkpoint(training))


def throughput(history: list[dict]) -> float:
    """Tokens per second between lines of the log; before the first lie compilation and warm-up."""
    lines = [line for line in history if "loss" in line and "train_runtime" in line]
    tokens = seconds = 0.0
    for before, line in pairwise(lines):
        passed = line["train_runtime"] - before["train_runtime"]
        if passed > 0:  # not over the gap of a resumed run
            tokens += line["num_input_tokens_seen"] - before["num_input_tokens_seen"]
            seconds += passed
    return tokens / seconds if seconds else math.nan


def trained_model(trainer: RecoveryTrainer) -> PreTrainedModel:
    """The model as its users would load it."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    del model.forward  # the loss's; the model's own is needed now
    compile_layers(model, on=False)  # batches of many lengths follow
    model.set_attn_implementation("sdpa")
    if trainer.args.bf16:
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32, as they are loaded
            parameter.data = parameter.data.bfloat16()
    return model.eval()


@torch.no_grad()
def measure_divergence(model: PreTrainedModel, original: PreTrainedModel, rows: list[dict], batch_size: int) -> float:
    """KL(original, model) in nats a token: far less noisy than accuracy, and what distillation minimises."""
    total, count = 0.0, 0
    for begin in range(0, len(rows), batch_size):
        batch = collate_packed(rows[begin : begin + batch_size])
        labels = batch.pop("labels")[:, 1:].flatten().to(model.device)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        states = [
            m.model(**packed_inputs(m, **batch)).last_hidden_state[:, :-1].flatten(0, 1) for m in (model, original)
        ]
        heads = model.lm_head, states[0], labels, original.lm_head, states[1]
        (distances,) = token_losses([Distillation()], *heads)
        total, count = total + distances.double().sum().item(), count + int((labels != IGNORED).sum())
    return total / count if count else math.nan


def pack_items(items: list[dict], tokenizer) -> list[dict]:
    """Contexts with their right choices as text, packed into rows."""
    documents = tokenize([f"{item['context']} {item['choices'][item['answer']]}" for item in items], tokenizer)
    packed = pack_documents(documents, 512)
    return [dict(input_ids=ids, lengths=lengths) for ids, lengths in zip(*packed.values(), strict=True)]


def measure_choices(model: PreTrainedModel, original: PreTrainedModel, tokenizer, sets: dict[str, list[dict]]) -> dict:
    """Length-normalised accuracy and standard error, of each set and of their average; which items were right; and how
    far the preferences among choices are from the original's."""
    accuracies, right, errors = {}, {}, {}
    for name, items in sets.items():
        scores, wanted = (score_choices(m, tokenizer, items, batch_size=64) for m in (model, original))
        sizes = choice_bytes(items)
        result = MultipleChoice.from_scores(scores, sizes, [item["answer"] for item in items])
        accuracies[name] = [result.accuracy_norm, result.stderr_norm]
        right[name] = result.right_norm
        errors[name] = preference_error(scores, wanted, sizes)
    values, stderrs = zip(*accuracies.values(), strict=True)
    average = [sum(values) / len(values), math.sqrt(sum(error**2 for error in stderrs)) / len(stderrs)]
    errors["average"] = sum(errors.values()) / len(errors)
    return {"accuracy": accuracies | {"average": average}, "right": right, "preference_error": errors}


def run_row(run: Run, folder: str, args: argparse.Namespace) -> None:
    """Train and measure one row, and append it to the results."""
    print(run.name, flush=True)
    torch._dynamo.reset()  # what earlier rows compiled counts against a limit, behind which layers run uncompiled
    with tempfile.TemporaryDirectory() as scratch:
        output = str(args.work / run.name.replace("/", "-")) if args.work else scratch
        trainer = train(run, folder, args, output)
        history = trainer.state.log_history
        last = next(line for line in reversed(history) if "eval_perplexity" in line)
        model, tokenizer, batch_size = trained_model(trainer), trainer.processing_class, trainer.args.eval_batch_size
        original = AutoModelForCausalLM.from_pretrained(args.source, dtype=model.dtype).to(model.device).eval()
        held_out, sets, perplexities = TokenRows(args.eval_rows), {}, {}
        texts: dict[str, list[dict]] = {"validation": [held_out[index] for index in range(len(held_out))]}
        for name, spec in (item.split("=", 1) for item in args.text):
            blocks = read_blocks(spec, tokenizer, args.blocks)
            texts[name] = [dict(input_ids=block.numpy(), lengths=[len(block)]) for block in blocks]
            measured = measure_perplexity(model, blocks)
            perplexities[name] = [measured.perplexity, measured.stderr]
        if args.sets:
            sets = {name: read_items(args.sets / f"{name}.jsonl")[: args.limit] for name in SETS}
            texts["sets"] = pack_items(list(chain.from_iterable(sets.values())), tokenizer)
        row = {
            "run": asdict(run),
            "steps": trainer.state.global_step if run.tokens else 0,
            "eval_perplexity": [last["eval_perplexity"], last["eval_perplexity_stderr"]],
            "perplexity": perplexities,
            "tokens_per_second": throughput(history),
            "divergence": {
                name: measure_divergence(model, original, rows, batch_size) for name, rows in texts.items()
            },
            **(measure_choices(model, original, tokenizer, sets) if sets else {"accuracy": None, "right": None}),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "workers": args.workers,
            "rows": args.rows.name,
            "order": args.order,
            "hidden_weight": args.hidden_weight if run.distillation else 0.0,
            **({"muon_rates": args.muon} if args.muon else {}),
            "arguments": args.arguments,
        }
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def take_row(rows: list[tuple[Run, str]], deadline: float) -> tuple[Run, str] | None:
    """The first row whose model is there, out of the list; after the deadline the first."""
    for index, (_, folder) in enumerate(rows):
        if Path(folder).exists() or time.time() >= deadline:
            return rows.pop(index)
    return None


def work(args: argparse.Namespace, rows, lock, deadline: float) -> None:
    """Rows of the shared list, on the one GPU that this process sees."""
    while rows:
        with lock:
            taken = take_row(rows, deadline)
        if taken is None:
            time.sleep(1)
            continue
        try:
            run_row(*taken, args)
        except Exception:  # the other rows do not depend on this one
            traceback.print_exc()


def run_all(args: argparse.Namespace) -> None:
    done = {Run(**row["run"]).key for row in read_results(args.results)} if args.results.is_file() else set()
    wanted = [row for row in plan_runs(args) if row[0].key not in done and re.search(args.only, row[0].name)]
    context = multiprocessing.get_context("spawn")
    manager = context.Manager()
    rows, lock = manager.list(wanted), manager.Lock()
    every = ",".join(map(str, range(torch.cuda.device_count())))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    shared = (args, rows, lock, time.time() + args.wait)
    workers = [context.Process(target=work, args=shared) for _ in range(args.workers)]
    for number, worker in enumerate(workers):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]  # the worker inherits it
        worker.start()
    deadline = time.monotonic() + args.seconds
    for worker in workers:
        worker.join(None if math.isinf(args.seconds) else max(0, deadline - time.monotonic()))
        worker.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tokens = commands.add_parser("tokens", help="Tokenise text and pack it into rows.")
    tokens.add_argument("tokenizer")
    tokens.add_argument(
        "data", nargs="+", help="Files .jsonl or .jsonl.gz with a column `text`; patterns name several."
    )
    tokens.add_argument("output", type=Path)
    tokens.add_argument("--length", type=int, default=2048)
    tokens.add_argument("--short-lengths", type=int, nargs="+", default=(), help="See `mha2mla train`.")
    tokens.add_argument("--lookback-share", type=float, default=0.0, help="Share of rows in which passages return.")
    tokens.set_defaults(call=write_tokens)
    run = commands.add_parser("run", help="Train and measure what the results file does not hold yet.")
    run.add_argument("results", type=Path)
    run.add_argument("--source", required=True, help="The original model: teacher and control.")
    run.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="A conversion.")
    run.add_argument("--rows", type=Path, required=True)
    run.add_argument("--eval-rows", type=Path, required=True)
    run.add_argument("--sets", type=Path, help=f"Folder of {', '.join(SETS)}.jsonl; by default no accuracy.")
    run.add_argument("--only", default="", help="Rows in whose name, like original/all/0/20M, this is found.")
    run.add_argument("--work", type=Path, help="Folder for checkpoints, from which rows that were killed go on.")
    run.add_argument("--workers", type=int, default=1, help="Processes, spread over the GPUs: rows side by side.")
    run.add_argument("--seconds", type=float, default=math.inf, help="Stop then; with --work rows go on another time.")
    run.add_argument("--wait", type=float, default=0, help="Seconds to wait for models that are not there yet.")
    run.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE[:FIELD]", help="More text to measure on."
    )
    run.add_argument("--blocks", type=int, default=40, help="Blocks of 1,024 tokens of each such text at most.")
    run.add_argument("--order", type=int, default=0, help="Seed of the order of the rows of tokens.")
    run.add_argument(
        "--muon", type=float, nargs=2, metavar="RATE", help="Muon's rates for matrices of layers, and of attention."
    )
    run.add_argument("--limit", type=int, help="Items of each set at most.")
    run.add_argument("--trainable", nargs="+", default=["all", "attention", "lora"])
    run.add_argument("--distillation", nargs="+", type=float, default=[0.0, 1.0], help="Weights of the teacher.")
    run.add_argument("--hidden-weight", type=float, default=0.0, help="Of the states, where there is a teacher.")
    run.add_argument("--tokens", nargs="+", default=["5e6", "20e6", "78e6"])
    run.set_defaults(call=run_all)
    table = commands.add_parser("table", help="Print the table and draw the curves.")
    table.add_argument("results", type=Path)
    table.add_argument("--plot", type=Path)
    table.set_defaults(call=write_table)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    args.arguments = sys.argv[split + 1 :]
    args.call(args)


if __name__ == "__main__":
    main()
