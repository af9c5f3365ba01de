"""The ablation of conversion, and recovery behind it: every row converts, and what is kept is trained and measured."""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pico import byte_pair_tokenizer, make_source

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import conversion_ablation
import recovery
from recovery_table import SETS, read_results

SIZES = ("qk_rope_head_dim=4", "kv_lora_rank=8", "samples=2", "length=16", "refine_steps=2", "cache_ratio=null")


@pytest.fixture
def place(tmp_path):
    """A source with its tokenizer, text, and one item of each set."""
    tokenizer = byte_pair_tokenizer()
    source = make_source()
    source.resize_token_embeddings(len(tokenizer))
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    lines = [
        json.dumps({"text": f"Storm {i} took the roof of the market and broke {i} boats. " * 4}) for i in range(40)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    (tmp_path / "sets").mkdir()
    item = {"context": "The tide comes", "choices": ["every day.", "by boat."], "answer": 0}
    for name in SETS:
        (tmp_path / "sets" / f"{name}.jsonl").write_text(json.dumps(item))
    return tmp_path


def ablation_arguments(place: Path, **changes) -> argparse.Namespace:
    chosen = dict(source=str(place / "source"), data=str(place / "texts.jsonl"), device="cpu", blocks=2, keep=None)
    return argparse.Namespace(**chosen | dict(eval=[], set=list(SIZES)) | changes)


@pytest.mark.parametrize("variant", conversion_ablation.VARIANTS)
def test_every_variant_is_another_conversion(place, variant):
    args = ablation_arguments(place, keep=place / "kept", set=[*SIZES, "refine_steps=0"])
    names = "closed 72", f"closed 72, {variant}"
    rows = [conversion_ablation.run_row(name, args) for name in names]
    assert [(row["name"], row["cache"]) for row in rows] == [(name, 72) for name in names]
    folders = [conversion_ablation.model_folder(name, args.keep) for name in names]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    same = all(torch.equal(first[name], second[name]) for name in first)
    # The same lists may come out of another choice, and without steps there is nothing to refine.
    assert not same or variant in ("ranked by energy", "per-layer lists", "refined behind attention")


@pytest.mark.parametrize(
    "name", ["default 48, plain", "default 120, refined behind attention", "paper 2-norm joint 72"]
)
def test_rows_are_measured_and_leave_nothing_unless_kept(place, name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of its own: other tests make such folders meanwhile
    sizes = SIZES if "default" in name else ["samples=2", "length=16"]
    args = ablation_arguments(place, set=list(sizes), eval=[f"texts={place / 'texts.jsonl'}"])
    row = conversion_ablation.run_row(name, args)
    assert row["texts"][0] > 1 and not list(tmp_path.glob("ablation-*"))


def test_models_that_come_late_are_trained_and_measured(place, monkeypatch, capsys):
    """`--wait` takes the rows whose models are there; every row has all measures, before and after training."""
    args = ablation_arguments(place, keep=place / "kept")
    early, late = (conversion_ablation.model_folder(name, args.keep) for name in ("closed 72", "default 72"))
    conversion_ablation.run_row("closed 72", args)

    def one_by_one(run_args):
        rows = [row for row in recovery.plan_runs(run_args) if re.search(run_args.only, row[0].name)]
        order = []
        while rows:
            taken = recovery.take_row(rows, time.time() + run_args.wait)
            if taken is None:  # all that is there is done
                conversion_ablation.run_row("default 72", args)
                continue
            order.append(taken[0].name)
            recovery.run_row(*taken, run_args)
        assert order == [
            "original/none/0/0M",
            *("closed/none/0/0M", "closed/all/1/6.4e-05M"),
            *("default/none/0/0M", "default/all/1/6.4e-05M"),
        ]

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["recovery.py", *map(str, arguments)])
        recovery.main()

    monkeypatch.setattr(recovery, "run_all", one_by_one)
    command("tokens", place / "source", place / "texts.jsonl", place / "rows.npz", "--length", 32)
    options = ["--text", f"prose={place / 'texts.jsonl'}", "--sets", place / "sets", "--limit", 1, "--wait", 600]
    recipe = ["--use_cpu", "--per_device_train_batch_size", 1, "--attention_learning_rate", 1e-3]
    command(
        *("run", place / "results.jsonl", "--source", place / "source", "--rows", place / "rows.npz"),
        *("--eval-rows", place / "rows.npz", "--model", f"default={late}", "--model", f"closed={early}", *options),
        *("--trainable", "all", "--distillation", 1, "--hidden-weight", 4, "--tokens", 64, "--order", 1),
        *("--only", "^original/none|^(?!original)", "--", *recipe),
    )
    results = read_results(place / "results.jsonl")
    assert [row["steps"] for row in results] == [0, 0, 2, 0, 2]
    for row in results:
        assert set(row["divergence"]) == {"validation", "prose", "sets"} and row["perplexity"]["prose"][0] > 1
    assert abs(results[0]["divergence"]["prose"]) < 1e-6 < results[1]["divergence"]["prose"]
    capsys.readouterr()
    command("table", place / "results.jsonl")
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "| KL, prose |" in head and len(lines) == 5 and {line.count("|") for line in lines} == {head.count("|")}
