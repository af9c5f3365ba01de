"""What each idea of the conversion is worth: perplexity of many conversions of one model, without any training.

    python benchmarks/conversion_ablation.py SOURCE --data 'corpus/train-*.jsonl.gz' \\
        --eval wikitext=wikitext2_valid.jsonl:raw --eval book=longdoc_book.jsonl --device cuda --workers 8

Rows whose name matches --rows (regular expressions) are run, several at a time, in the order of the expressions; a row
already in --results is not run again. The rows that take an idea away exchange one of the preset's steps for a
function of this file: there is no option for them. With --keep the models stay, for `recovery.py run` to train.
"""

import argparse
import gzip
import json
import re
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla.conversion import ConversionConfig, convert
from mha2mla.conversion.layerwise import LayerVisit
from mha2mla.conversion.presets.calibrated.low_rank import joint_low_rank
from mha2mla.conversion.presets.calibrated.pair_scores import mean_rotation, score_energy
from mha2mla.conversion.presets.calibrated.refine import refine_layer
from mha2mla.conversion.presets.calibrated.steps import Steps
from mha2mla.evaluation import measure_perplexity

SIZES = {120: (40, 80), 72: (24, 48), 48: (16, 32)}  # cache of SmolLM2-135M: rotary key + latent; a third rotary
PER_HEAD = {
    120: (14, 78),
    72: (8, 48),
    48: (6, 30),
}  # the same, a rotary key a key/value head


def sizes(rope: int, rank: int) -> dict:
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
    rotation, _ = mean_rotation(moments, factors, ridge)
    return rotation, score_energy(moments, factors)


def energy_alone(moments, factors, ridge=1e-3):
    """No mean rotation, and pairs ranked by the energy of their scores."""
    return torch.ones_like(factors), score_energy(moments, factors)


def scores_alike(probabilities):
    """Every pair of tokens counts the same for each query."""
    return (probabilities > 0).to(probabilities) / probabilities.shape[-1]


def tokens_alike(probabilities):
    """Every token counts the same."""
    return torch.ones_like(probabilities[0, 0])


def weights_alone(keys, values, root, rank):
    """The SVD of the weights, blind to the inputs' covariance."""
    plain = [torch.linalg.solve_triangular(root, rows, upper=False, left=False) for rows in (keys, values)]
    return joint_low_rank(*plain, torch.eye(len(root)).to(root), rank)


@dataclass
class AttentionVisit(LayerVisit):
    """A layer that ends after its attention."""

    def layer_output(self, state, attention):
        return state.to(attention.device) + attention


def refine_residual(layer, visit, stream, settings, seed):
    """Refinement against the residual stream after attention, the MLP left out: half the work a step."""
    visit = AttentionVisit(**{field.name: getattr(visit, field.name) for field in fields(visit)})
    return refine_layer(layer, visit, stream, settings, seed)


# name: (cache, options, steps of the preset `calibrated`)
ROWS: dict[str, tuple[int, dict, Steps]] = {}
for rule in ("high", "low", "uniform", "2-norm"):
    ROWS[f"paper {rule} joint"] = (120, dict(preset="paper", rope_selection=rule, cache_ratio=120 / 384), Steps())
ROWS["paper 2-norm split"] = (120, dict(preset="paper", svd="split", cache_ratio=120 / 384), Steps())
VARIANTS: dict[str, tuple[dict, Steps]] = {
    "no mean rotation": ({}, Steps(mean_rotation=no_rotation)),
    "ranked by energy": ({}, Steps(mean_rotation=by_energy)),
    "scores unweighted": ({}, Steps(score_weight=scores_alike)),
    "tokens unweighted": ({}, Steps(token_weight=tokens_alike)),
    # What is left: the shared key, the covariance of plain tokens, refinement.
    "plain": ({}, Steps(scores_alike, tokens_alike, energy_alone)),
    "weights alone": ({}, Steps(low_rank=weights_alone)),
    "refined behind attention": (dict(refine_steps=192), Steps(refine=refine_residual)),
    "per-layer lists": (dict(rope_frequencies="per-layer"), Steps()),
    "seed 1": (dict(seed=1), Steps()),  # how much a row is worth
}
for cache, split in SIZES.items():
    if cache != 120:
        ROWS[f"paper 2-norm joint {cache}"] = (cache, dict(preset="paper", cache_ratio=cache / 384), Steps())
    per_head = (dict(rope_layout="per-head") | sizes(*PER_HEAD[cache]), Steps())
    for name, (options, steps) in {"": ({}, Steps()), "per-head key": per_head, **VARIANTS}.items():
        tail = f", {name}" if name else ""
        ROWS[f"default {cache}{tail}"] = (cache, sizes(*split) | options, steps)
        ROWS[f"closed {cache}{tail}"] = (cache, sizes(*split) | options | dict(refine_steps=0), steps)


def make_config(options: dict, steps: Steps, args: argparse.Namespace) -> ConversionConfig:
    """The options of a row, overruled by those of --set that its preset has."""
    values = ConversionConfig.from_dict(dict(data=args.data, device=args.device) | options).to_dict()
    overrides = {key: json.loads(value) for key, value in (item.split("=") for item in args.set)}
    config = ConversionConfig.from_dict(values | {key: overrides[key] for key in overrides.keys() & values.keys()})
    vars(config.preset)["steps"] = steps  # for this row alone: steps are no option, but a class's
    return config


def read_blocks(spec: str, tokenizer, num_blocks: int) -> torch.Tensor:
    """`path[:field]` of a jsonl file, its texts in order, as blocks of 1,024 tokens."""
    path, _, field = spec.partition(":")
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        text = "\n\n".join(json.loads(line)[field or "text"] for line in file)
    ids = tokenizer(text[: num_blocks * 8192], add_special_tokens=False)["input_ids"]
    num_blocks = min(num_blocks, len(ids) // 1024)
    return torch.tensor(ids[: num_blocks * 1024]).view(num_blocks, 1024)


def model_folder(name: str, parent: Path) -> Path:
    """Where the model of a row is kept."""
    return parent / re.sub(r"[^a-z0-9]+", "-", name)


def run_row(name: str, args: argparse.Namespace) -> dict:
    """Convert and measure; the model is gone afterwards, unless it is to be kept."""
    cache, options, steps = ROWS[name] if name != "original" else (384, {}, Steps())
    scratch = Path(tempfile.mkdtemp(prefix="ablation-"))
    start = time.perf_counter()
    try:
        folder = Path(args.source) if name == "original" else model_folder(name, args.keep or scratch)
        if not folder.exists():
            convert(args.source, folder, make_config(options, steps, args))
        seconds = time.perf_counter() - start
        row = {"name": name, "cache": cache, "options": options, "set": args.set, "seconds": round(seconds, 1)}
        if args.eval:
            tokenizer = AutoTokenizer.from_pretrained(args.source)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
            for item in args.eval:
                text, spec = item.split("=", 1)
                measured = measure_perplexity(model, read_blocks(spec, tokenizer, args.blocks))
                row[text] = [round(measured.perplexity, 3), round(measured.stderr, 3)]
        return row
    finally:
        shutil.rmtree(scratch)


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
    parser.add_argument("--rows", nargs="+", default=[".*"])
    parser.add_argument("--keep", type=Path, help="Folder for the models: default-72 for the row `default 72`.")
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
    found = [name for pattern in args.rows for name in ["original", *ROWS] if re.search(pattern, name)]
    for name in dict.fromkeys(found):
        if name not in done:
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
