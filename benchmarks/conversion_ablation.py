"""What each idea of the conversion is worth: perplexity of many conversions of one model, without any training.

    python benchmarks/conversion_ablation.py SOURCE --data 'corpus/train-*.jsonl.gz' \\
        --eval wikitext=wikitext2_valid.jsonl:raw --eval book=longdoc_book.jsonl --device cuda --workers 8

Rows whose name matches --rows (a regular expression) are run, several at a time; a row already in --results is not run
again. The rows that take an idea away patch one function of the package for the time of the conversion: the product
has no switch for them.
"""

import argparse
import gzip
import json
import re
import shutil
import tempfile
import time
import traceback
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.multiprocessing as multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla.conversion import ConversionConfig, convert, pipeline
from mha2mla.conversion.presets.calibrated import closed_form as calibrated
from mha2mla.conversion.presets.calibrated import pair_scores, refine
from mha2mla.evaluation import measure_perplexity

SIZES = {120: (40, 80), 72: (24, 48), 48: (16, 32)}  # cache of SmolLM2-135M: rotary key + latent; a third rotary


def sizes(cache: int) -> dict:
    rope, rank = SIZES[cache]
    return dict(qk_rope_head_dim=rope, kv_lora_rank=rank)


def no_rotation(moments, factors, ridge=1e-3):
    """c = 1: RoPE dropped without repair, and the cost of that."""
    magnitude, square = factors.abs().square(), factors.square()
    s0, s1 = moments.s0 * magnitude, moments.s1 * magnitude
    t0, t1, t2 = moments.t0 * square, moments.t1 * square, moments.t2 * square
    cost = (s0 + t2.real) / 2 - (t1.real + s1.real) + (s0 + t0.real) / 2
    return torch.ones_like(factors), cost


def by_energy(moments, factors, ridge=1e-3):
    """The best rotation, but pairs ranked by the energy of their scores, not by the error of un-rotating them."""
    rotation, _ = pair_scores.mean_rotation(moments, factors, ridge)
    return rotation, pair_scores.score_energy(moments, factors)


def weights_alone(keys, values, root, rank):
    """The SVD of the weights, blind to the inputs' covariance."""
    plain = [torch.linalg.solve_triangular(root, rows, upper=False, left=False) for rows in (keys, values)]
    return calibrated_joint_low_rank(*plain, torch.eye(len(root)).to(root), rank)


calibrated_joint_low_rank = calibrated.joint_low_rank


def refine_residual(layer, visit, stream, settings, seed):
    """Refinement against the residual stream behind attention, the MLP left out: half the work a step."""
    target = replace(visit)
    target.after_mlp = lambda state: state
    with torch.no_grad():
        target.outputs = [
            (
                state.to(layer.o.device)
                + visit.layer.self_attn(
                    hidden_states=visit.attention_input(state),
                    position_embeddings=visit.position_embeddings,
                    attention_mask=None,
                )[0]
            ).to(state.device)
            for state in visit.states
        ]
    return refine.refine_layer(layer, target, stream, settings, seed)


# name: (cache, options, {function: replacement})
ROWS: dict[str, tuple[int, dict, dict]] = {}
for rule in ("high", "low", "uniform", "2-norm"):
    ROWS[f"paper {rule} joint"] = (120, dict(preset="paper", rope_selection=rule, cache_ratio=120 / 384), {})
ROWS["paper 2-norm split"] = (120, dict(preset="paper", svd="split", cache_ratio=120 / 384), {})
for cache in SIZES:
    if cache != 120:
        ROWS[f"paper 2-norm joint {cache}"] = (cache, dict(preset="paper", cache_ratio=cache / 384), {})
    ROWS[f"closed {cache}"] = (cache, dict(refine_steps=0, **sizes(cache)), {})
    ROWS[f"default {cache}"] = (cache, sizes(cache), {})
for name, options, patches in (
    ("per-head key", dict(rope_layout="per-head", qk_rope_head_dim=14, kv_lora_rank=78), {}),
    ("no mean rotation", {}, {"mean_rotation": no_rotation}),
    ("ranked by energy", {}, {"mean_rotation": by_energy}),
    ("scores unweighted", {}, {"softmax_weight": lambda p: (p > 0).to(p) / p.shape[-1]}),
    ("tokens unweighted", {}, {"received_attention": lambda p: torch.ones_like(p[0, 0])}),
    ("refined behind attention", dict(refine_steps=192), {"refine_layer": refine_residual}),
    ("weights alone", {}, {"joint_low_rank": weights_alone}),
):
    ROWS[f"closed 120, {name}"] = (120, dict(refine_steps=0) | sizes(120) | options, patches)
    ROWS[f"default 120, {name}"] = (120, sizes(120) | options, patches)


def read_blocks(spec: str, tokenizer, num_blocks: int) -> torch.Tensor:
    """`path[:field]` of a jsonl file, its texts in order, as blocks of 1,024 tokens."""
    path, _, field = spec.partition(":")
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        text = "\n\n".join(json.loads(line)[field or "text"] for line in file)
    ids = tokenizer(text[: num_blocks * 8192], add_special_tokens=False)["input_ids"]
    num_blocks = min(num_blocks, len(ids) // 1024)
    return torch.tensor(ids[: num_blocks * 1024]).view(num_blocks, 1024)


def run_row(name: str, args: argparse.Namespace) -> dict:
    cache, options, patches = ROWS[name] if name != "original" else (384, {}, {})
    folder = Path(tempfile.mkdtemp(prefix="ablation-"))
    start = time.perf_counter()
    try:
        if name == "original":
            model_folder = Path(args.source)
        else:
            overrides = {key: json.loads(value) for key, value in (item.split("=") for item in args.set)}
            base = dict(calibration_data=args.data, device=args.device)
            config = ConversionConfig(**(base | options | overrides))
            with ExitStack() as stack:
                for function, replacement in patches.items():
                    module = pipeline if function == "refine_layer" else calibrated
                    stack.enter_context(patch.object(module, function, replacement))
                model_folder = convert(args.source, folder / "model", config)
        seconds = time.perf_counter() - start
        tokenizer = AutoTokenizer.from_pretrained(args.source)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(args.device)
        row = {"name": name, "cache": cache, "options": options, "set": args.set, "seconds": round(seconds, 1)}
        for item in args.eval:
            text, spec = item.split("=", 1)
            measured = measure_perplexity(model, read_blocks(spec, tokenizer, args.blocks))
            row[text] = [round(measured.perplexity, 3), round(measured.stderr, 3)]
        return row
    finally:
        shutil.rmtree(folder)


def work(args: argparse.Namespace, queue, deadline: float) -> None:
    torch.set_num_threads(args.threads)
    while time.time() < deadline:
        try:
            name = queue.get(timeout=1)
        except Exception:  # the queue is empty
            return
        try:
            row = run_row(name, args)
        except Exception as error:
            traceback.print_exc()
            row = {"name": name, "error": repr(error)}
        with open(args.results, "a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key != "options"}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--data", required=True, help="Calibration text.")
    parser.add_argument("--eval", action="append", default=[], metavar="NAME=FILE[:FIELD]")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--rows", default=".*")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=JSON", help="Overrules every row.")
    parser.add_argument("--results", default="ablation.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="Per worker.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="No row starts after that.")
    args = parser.parse_args()
    results = Path(args.results)
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for name in ["original", *ROWS]:
        if re.search(args.rows, name) and name not in done:
            queue.put(name)
    deadline = time.time() + args.seconds
    workers = [context.Process(target=work, args=(args, queue, deadline)) for _ in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    names = [item.split("=", 1)[0] for item in args.eval]
    print(f"\n| row | cache | {' | '.join(names)} | seconds |\n|---|---|{'---|' * (len(names) + 1)}")
    for row in rows:
        if "error" not in row:
            cells = " | ".join(f"{row[text][0]:.2f} ± {row[text][1]:.2f}" for text in names)
            print(f"| {row['name']} | {row['cache']} | {cells} | {row['seconds']} |")


if __name__ == "__main__":
    main()
