"""The eval command from end to end, on a pico model and its conversions."""

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import pico_tokenizer

from mha2mla.cli.main import main
from mha2mla.evaluation import run
from mha2mla.evaluation.measures import harness
from mha2mla.evaluation.settings import EvaluationSettings
from pico import VOCAB, make_mla, make_source

SIZES = ("--length", "16", "--long-length", "20", "--agreement-length", "16")
SIZES += ("--prompt-length", "8", "--new-tokens", "4")
PAPER = ("--rope-selection", "high")
TASKS = "choices,texts,positions:texts,agreement:texts,passkey,completion"


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(4, VOCAB, (count,), generator=generator).tolist())


@pytest.fixture
def sets(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    files = {
        "choices": [
            {
                "id": str(i),
                "context": words(6, i),
                "choices": [words(n, 90 + i + n) for n in (1, 2, 3)],
                "answer": i % 3,
            }
            for i in range(6)
        ],
        "texts": [{"id": str(i), "text": words(30, 40 + i)} for i in range(3)],
        "passkey": [
            {"id": f"{n}-{d}", "context": words(n, n), "target": " w9", "length": n, "depth": d}
            for n in (8, 16)
            for d in (0.1, 0.9)
        ],
        "completion": [{"id": str(i), "context": words(5, i), "target": " w9"} for i in range(3)],
    }
    for name, items in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def models(save_source, calibration_file, tmp_path):
    source = save_source("gqa")
    text = ("--data", calibration_file, "--samples", 4, "--length", 16)
    options = ("--cache-ratio", 0.5, "--refine-steps", 1)
    assert main(["convert", *map(str, (source, tmp_path / "half", *options, *text))]) == 0
    return [str(source), str(tmp_path / "half")]


def arguments(models, sets, tmp_path, *more, tasks=TASKS):
    output = ("--output", str(tmp_path / "results"), "--data", str(sets), "--tasks", tasks)
    return ["eval", *models, *output, *SIZES, *more]


def test_tables_page_and_results(models, sets, tmp_path, capsys):
    assert main(arguments(models, sets, tmp_path, "--batch-size", "auto")) == 0
    printed = capsys.readouterr().out
    titles = ("Multiple choice, accuracy in %", "Difference from the original on the same items (paired)")
    for title in (*titles, "Perplexity, bits per byte", "agreement:texts", "passkey"):
        assert title in printed
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    original, half = results["models"]
    assert (original["name"], half["name"]) == ("original", "half")
    # Measured: 2 layers, fp32; keys and values of 2 heads of 12 dims, and half of that.
    assert original["cache_bytes_per_token"] == 2 * 2 * 2 * 12 * 4
    assert half["cache_bytes_per_token"] == original["cache_bytes_per_token"] / 2
    assert "-50.00 %" in printed
    assert set(half["tasks"]) == set(TASKS.split(","))
    assert set(original["tasks"]) == set(half["tasks"]) - {"agreement:texts"}
    assert half["tasks"]["choices"]["numbers"]["num_items"] == 6
    assert half["tasks"]["texts"]["numbers"]["num_tokens"] == 90
    assert [r["end"] for r in half["tasks"]["positions:texts"]["numbers"]["ranges"]] == [20]
    assert len(half["tasks"]["passkey"]["numbers"]["cells"]) == 4
    assert half["tasks"]["completion"]["numbers"]["cells"] == []
    environment = results["runs"][0]["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert {"commit", "device", "platform"} <= set(environment)
    assert results["runs"][0]["command"].startswith("mha2mla eval ")
    assert results["settings"]["seed"] == 0

    page = (tmp_path / "results" / "report.html").read_text()
    # Mean accuracy, perplexity, a heat map for each model, perplexity by position; three of the conversion.
    assert page.count("data:image/png;base64,") == 5 + 3
    assert "http" not in page
    # It is titled by the model, and opens with the result; so do the tables end on the terminal.
    assert f"<h1>{Path(models[0]).name}, converted to latent attention</h1><p class=result>half: 50.00 % less" in page
    (result,) = [line for line in printed.splitlines() if line.startswith("half: ")]
    average = re.search(r"half \|.*?\| +(-?[\d.]+) ±", printed[printed.index("Difference from the original") :])
    before, after = (model["tasks"]["texts"]["numbers"]["perplexity"] for model in (original, half))
    cache = r"half: 50\.00 % less cache than the original's fp32, "
    lost = re.fullmatch(cache + r"(\S+) ± \S+ points (lost|gained), perplexity (\S+) % \(texts\)\.", result)
    assert float(lost[1]) * (-1 if lost[2] == "lost" else 1) == pytest.approx(float(average[1]), abs=0.051)
    assert float(lost[3]) == pytest.approx(100 * (after / before - 1), abs=0.051)
    assert "Multiple choice, accuracy in %" in (tmp_path / "results" / "table.md").read_text()


def test_generated_tasks_and_positions_stand_beside_the_originals(models, sets, tmp_path, capsys):
    for folder in models:  # prompts of words that the tokenizer does not know; only their number matters here
        config = json.loads((Path(folder) / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    names = "positions:texts,long:passkey,long:counting"
    more = ("--contexts", "120,160", "--limit", "2", "--batch-size", "2")
    assert main(arguments(models, sets, tmp_path, *more, tasks=names)) == 0
    printed = capsys.readouterr().out
    assert "long:counting: share of the answers written, in % (by guessing 33.3, 33.3)" in printed
    assert "long:passkey: difference from the original on the same prompts (paired), in points" in printed
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    original, half = (model["tasks"] for model in results["models"])
    assert [part["length"] for part in half["long:passkey"]["numbers"]["lengths"]] == [120, 160]
    pairs = zip(*(m["positions:texts"]["numbers"]["ranges"][0]["losses"] for m in (original, half)), strict=True)
    lost = [after - before for before, after in pairs]
    table = printed[printed.index("positions:texts: loss by position less") :]
    assert f"{sum(lost) / len(lost):.4f} ±" in re.search(r"half \|.*", table)[0]
    pictures = (tmp_path / "results" / "report.html").read_text().count("data:image/png;base64,")
    assert pictures == 2 + 1 + 3  # a heat map for each model, positions; three of the conversion


def test_killed_run_continues_with_the_tasks_not_yet_done(models, sets, tmp_path, monkeypatch, capsys):
    measured = []
    measure_task = run.measure_task

    def killed_at_third(task, *args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(task.name)
        return measure_task(task, *args)

    monkeypatch.setattr(run, "measure_task", killed_at_third)
    command = arguments(models, sets, tmp_path, tasks="choices,texts,completion")
    assert main(command) == 130
    measured.clear()
    monkeypatch.setattr(
        run, "measure_task", lambda task, *args: measured.append(task.name) or measure_task(task, *args)
    )
    assert main(command) == 0
    assert measured == ["completion", "choices", "texts", "completion"]
    measured.clear()
    assert main(command) == 0
    assert measured == []

    # Other items under the name are measured, and so is a model that changed.
    path = sets / "completion.jsonl"
    path.write_text(path.read_text().replace(" w9", " w8"))
    assert main(command) == 0
    assert measured == ["completion", "completion"]
    measured.clear()
    config = tmp_path / "half" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert main(command) == 0
    assert measured == ["choices", "texts", "completion"]
    runs = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    assert len(runs) == 5
    capsys.readouterr()

    assert main([*command, "--limit", "2"]) == 2
    assert "was measured with {'limit': None}, now asked for {'limit': 2}" in capsys.readouterr().err


def test_results_so_far_are_kept_when_an_item_is_too_long(models, sets, tmp_path, capsys):
    with (sets / "completion.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "context": words(40, 0), "target": " w9"}) + "\n")
    assert main(arguments(models, sets, tmp_path, tasks="choices,completion")) == 2
    assert "Item long: context and continuation need 40 tokens, the model takes 32" in capsys.readouterr().err
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert list(results["models"][0]["tasks"]) == ["choices"]


def test_limit_takes_the_first_items_and_spreads_over_lengths(models, sets, tmp_path):
    assert main(arguments(models[:1], sets, tmp_path, "--limit", "2", tasks="choices,passkey")) == 0
    tasks = json.loads((tmp_path / "results" / "results.json").read_text())["models"][0]["tasks"]
    assert tasks["choices"]["numbers"]["num_items"] == 2
    assert {cell["length"] for cell in tasks["passkey"]["numbers"]["cells"]} == {8, 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "agreement:choices"), "needs items with `text`"),
        (("--tasks", "perplexity:missing"), "There is no missing.jsonl in {sets}. --data has choices, completion"),
        (
            ("--tasks", "choises"),
            "There is no choises.jsonl in {sets}. Did you mean choices? If choises is a task",
        ),
        (("--tasks", "shape:texts"), "Unknown task 'shape:texts': before the colon stands perplexity, positions"),
        (("--tasks", "mmlu"), "If mmlu is a task of lm-evaluation-harness, install that: `pip install '.[eval]'`"),
        (("--tasks", "harness:mmlu"), "error: If mmlu is a task of lm-evaluation-harness"),
        (
            ("--tasks", "mmlu", "--data", "o/texts"),
            "The task 'mmlu' is not in --data o/texts. --data has texts. If",
        ),
        (("--tasks", ""), "must be names with commas between them, got ''"),
        (("--caches", "int4,,int8"), "must be names with commas between them, got 'int4,,int8'"),
        (("--limit", "0"), "limit=0 must be at least 1"),
        (("--length", "64", "--stride", "65"), "stride=65 would leave out tokens between windows of length=64: give"),
        (("--dtype", "int3"), "dtype must be auto, float32, bfloat16 or float16, got 'int3'"),
        (("--data", "missing"), "--data missing is not a folder"),
    ],
)
def test_mistakes_show_before_anything_is_measured(sets, tmp_path, options, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # as on a machine without it
    harness.harness_task_names.cache_clear()
    output = str(tmp_path / "results")
    assert main(["eval", "no-such-model", "--data", str(sets), "--output", output, *options]) == 2
    assert message.format(sets=sets) in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("option", "length"),
    [
        ("--length", 4096),
        ("--long-length", 4096),
        ("--agreement-length", 4096),
        ("--prompt-length", 4096 + 4),
        ("--contexts", 4096),
    ],
)
def test_a_length_beyond_the_context_shows_before_anything_is_measured(models, sets, tmp_path, option, length, capsys):
    more = ("--tasks", "long:passkey") if option == "--contexts" else ()
    assert main(arguments(models, sets, tmp_path, option, "4096", *more)) == 2
    told = capsys.readouterr().err
    assert f"would be read {length} tokens at a time, and the context of {models[0]} has" in told
    assert f"give {option} " in told and not (tmp_path / "results").exists()


def test_contexts_below_the_shortest_prompt_show_before_anything_is_measured(models, sets, tmp_path, capsys):
    tasks = "choices,long:passkey"
    assert main(arguments(models, sets, tmp_path, "--contexts", "20", tasks=tasks)) == 2
    told = capsys.readouterr().err
    assert "long:passkey: The smallest prompt of this task has" in told and "20 are too few. Give larger" in told
    assert not (tmp_path / "results").exists()


def test_models_whose_folders_have_one_name_are_told_apart(models, sets, tmp_path, capsys):
    original, half = models
    for parent in ("a", "b"):
        shutil.copytree(half, tmp_path / parent / "merged")
    three = [original, f"{tmp_path / 'a' / 'merged'}/", str(tmp_path / "b" / "merged")]
    assert main(arguments(three, sets, tmp_path, tasks="choices")) == 0
    assert main(arguments([f"{original}/", *three[1:]], sets, tmp_path, tasks="choices")) == 0  # all done before
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["models"]
    assert [row["name"] for row in rows] == ["original", "a/merged", "b/merged"]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, "--caches latent-int4: no model's cache can be held so"),
        (2, "agreement:texts compares with the original, and --caches latent-int4 leaves that out"),
    ],
)
def test_caches_that_leave_nothing_to_measure_or_compare_with_are_told_first(
    count, message, models, sets, tmp_path, capsys
):
    more = ("--caches", "latent-int4")
    assert main(arguments(models[:count], sets, tmp_path, *more, tasks="agreement:texts")) == 2
    told = capsys.readouterr().err
    assert message in told and "Add dynamic" in told and not (tmp_path / "results").exists()


def test_malformed_file_is_refused_with_its_line(sets, tmp_path, capsys):
    (sets / "broken.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 7}\n')
    assert main(["eval", "no-such-model", "--data", str(sets), "--output", str(tmp_path / "results")]) == 2
    assert "broken.jsonl:1: `answer` must be the index of a choice, 0 to 1, got 7" in capsys.readouterr().err
    assert main(["eval", "no-such-model"]) == 2
    assert "give --tasks, or --data" in capsys.readouterr().err


def write_results(folder: Path, **content) -> None:
    """Results of another making, beside the folder of a model."""
    (folder.parent / "results").mkdir()
    (folder.parent / "results" / "results.json").write_text(json.dumps(content))


def with_models(*models) -> dict:
    return {"settings": asdict(EvaluationSettings()), "runs": [], "models": models}


def shortened(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shortened(folder / "model.safetensors", 2000), "the weights of"),
        (lambda folder: shortened(folder / "tokenizer.json", 100), "the tokenizer of"),
        (
            lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
            "has no tokenizer files. Copy them from",
        ),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "adapter_config.json), which is",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("{}"), "Should have a `model_type` key"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json: it is not a transformers checkpoint"),
        (lambda folder: (folder / "conversion.json").write_text("[]"), "must hold a JSON object, got list"),
        (lambda folder: (folder / "conversion.json").write_text('{"source": "x"}'), "has no 'source_cache_width'"),
        (write_results, "`mha2mla eval` did not write it"),
        (
            lambda folder: write_results(folder, **with_models({"name": "x"})),
            "has a model that `mha2mla eval` did not write",
        ),
        (lambda folder: write_results(folder, **with_models(3)), "has a model that `mha2mla eval` did not write"),
    ],
)
def test_broken_checkpoints_end_in_a_sentence(spoil, message, sets, tmp_path, capsys):
    original, converted = tmp_path / "original", tmp_path / "converted"
    for folder in (original, converted):
        make_mla().save_pretrained(folder)
        pico_tokenizer().save_pretrained(folder)
    spoil(converted)
    paths, output = [str(original), str(converted)], str(tmp_path / "results")
    assert main(["eval", *paths, "--data", str(sets), "--tasks", "completion", "--output", output]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["a file", "a dangling link", "a folder for a file", "numbers"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(fault, models, sets, tmp_path, capsys):
    output = tmp_path / "results"
    if fault == "a file":
        output.write_text("")
    elif fault == "a dangling link":
        output.symlink_to(tmp_path / "no" / "such")
    elif fault == "a folder for a file":
        (output / "results.json").mkdir(parents=True)
    else:
        output.mkdir()
        (output / "results.json").write_text(json.dumps({"settings": 3, "runs": [], "models": []}))
    assert main(arguments(models, sets, tmp_path)) == 2
    captured = capsys.readouterr()
    assert "Choose another --output" in captured.err and "measurement 1" not in captured.err + captured.out


def test_another_model_by_the_name_of_the_source_is_no_original(save_source, tmp_path, monkeypatch, caplog):
    """The record has the path as it was typed: from another folder it may be another model's."""
    save_source("gqa").rename(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "source", "small", "--cache-ratio", "0.3", "--preset", "paper", *PAPER]) == 0
    assert run.find_original(["small"]) == "source"
    make_source("mqa").save_pretrained(tmp_path / "source")
    assert run.find_original(["small"]) is None
    assert "small is a conversion of source, and what lies there from here has another cache" in caplog.text
