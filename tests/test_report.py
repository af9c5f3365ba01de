"""What `mha2mla eval` shows of conversions: pictures on its page, results in model cards and in the Hub's form."""

import gzip
import json
import math

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from test_eval_command import arguments, models, sets, words  # noqa: F401 (fixtures)

from mha2mla.cli.main import main
from mha2mla.evaluation.report.figures import make_figures
from mha2mla.evaluation.report.long_tables import position_tables
from mha2mla.evaluation.report.page import write_page
from mha2mla.evaluation.report.tables import accuracy_tables, difference_tables, make_table
from mha2mla.evaluation.results import ORIGINAL, ModelResult, Results
from mha2mla.training.publish import plan_upload

TEXT = ("--samples", 4, "--length", 16)


@pytest.fixture
def conversions(save_source, calibration_file, tmp_path):
    source = save_source("gqa")
    for name, options in (
        ("big", ("--cache-ratio", 0.5, "--refine-steps", 1)),
        ("small", ("--cache-ratio", 0.3, "--refine-steps", 1)),
        ("paper", ("--cache-ratio", 0.5, "--preset", "paper")),
    ):
        command = (source, tmp_path / name, *options, "--data", calibration_file, *TEXT)
        assert main(["convert", *map(str, command)]) == 0
    return tmp_path


@pytest.mark.parametrize(
    "dtype, header, size",
    [("bfloat16", "bytes/token bf16", "192"), ("float32", "bytes/token", "192 fp32")],
)
def test_bytes_are_told_with_their_type(dtype, header, size):
    def row(name, dtype):
        return ModelResult(name, name, name, "dynamic", "", 192.0, dtype, 1)

    table = make_table(Results({}, models=[row("original", "bfloat16"), row("converted", dtype)]), "", {})
    assert table.header[1] == header and table.rows[1][1] == size


def row(name: str, tasks: dict[str, dict], preset: str = "calibrated") -> ModelResult:
    return ModelResult(name, name, preset, "dynamic", "", 192.0, "float32", 1, tasks)


def of_items(kind: str, digest: str, numbers: dict) -> dict:
    return {"task": {"kind": kind, "digest": digest, "numbers": numbers, "seconds": 1.0, "run": 0}}


@pytest.mark.parametrize("digest, shown", [("same", "-50.00 ± 50.00"), ("other", "-")])
def test_only_the_same_items_are_paired(digest, shown):
    numbers = {"accuracy_norm": 1.0, "stderr_norm": 0.0, "right_norm": "11"}
    original = row("original", of_items("choice", "same", numbers), ORIGINAL)
    model = row("converted", of_items("choice", digest, numbers | {"right_norm": "01"}))
    (table,) = difference_tables(Results({}, models=[original, model]))
    assert table.rows[1][-1] == shown


@pytest.mark.parametrize("digest, shown", [("same", "0.5000 ± 0.5000"), ("other", "-")])
def test_only_the_same_documents_are_paired(digest, shown):
    part = {"begin": 1, "end": 8, "perplexity": 2.0, "stderr": 0.1}
    original = row("original", of_items("positions", "same", {"ranges": [part | {"losses": [1.0, 1.0]}]}), ORIGINAL)
    model = row("converted", of_items("positions", digest, {"ranges": [part | {"losses": [1.0, 2.0]}]}))
    _, table = position_tables(Results({}, models=[original, model]))
    assert table.rows[1][-1] == shown


def test_an_accuracy_without_a_standard_error_is_shown():
    """lm-evaluation-harness has "N/A" for that of a single item."""
    results = Results({}, models=[row("original", of_items("harness", "", {"accuracy": 1.0}), ORIGINAL)])
    (table,) = accuracy_tables(results)
    assert table.rows[0][-2:] == ["100.00", "100.00"]


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    numbers = {"loss": 800.0, "perplexity": math.inf, "stderr": math.nan}
    Results({}, models=[row("original", of_items("perplexity", "", numbers))]).save(tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert kept["models"][0]["tasks"]["task"]["numbers"] == {"loss": 800.0, "perplexity": None, "stderr": None}


@pytest.mark.parametrize("value", [math.inf, None], ids=["measured", "read again"])
def test_a_perplexity_beyond_a_number_is_left_out_of_the_pictures(value):
    def rows(value: float | None) -> list[ModelResult]:
        part = {"begin": 1, "end": 8, "perplexity": value, "stderr": value}
        texts = row("texts", of_items("perplexity", "", {"perplexity": value, "stderr": value}))
        return [texts, row("positions", of_items("positions", "", {"ranges": [part]}))]

    figures = [figure for _, figure in make_figures(Results({}, models=[*rows(2.0), *rows(value)]))]
    heights = [y for figure in figures for line in figure.axes[0].lines for y in line.get_ydata()]
    assert len(figures) == 2 and all(map(math.isfinite, heights))
    assert not list(make_figures(Results({}, models=rows(value))))


def test_page_and_model_cards_show_the_conversions(conversions, calibration_file, capsys):
    folders = [str(conversions / name) for name in ("big", "small", "paper")]
    output = conversions / "results"
    command = ["eval", *folders, "--data", str(calibration_file), "--length", "16", "--limit", "3", "--cards"]
    command += ["--output", str(output)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for name in ("original", "big", "small", "paper"):  # the original was found by the record
        assert f" {name} |" in printed
    page = (output / "report.html").read_text()
    # Perplexity against cache size; frequencies, energy and loss by stage, of which the paper's preset measures none.
    assert page.count("data:image/png;base64,") == 1 + 3 + 3 + 1
    assert "http" not in page  # nothing is fetched
    assert "&quot;refine_steps&quot;: 1" in page
    big = conversions / "big"
    for picture in ("perplexity-calibration.png", "rope_frequencies.png", "latent_energy.png", "loss_by_stage.png"):
        assert (big / picture).read_bytes().startswith(b"\x89PNG")
    assert not (conversions / "paper" / "latent_energy.png").exists()
    card = (big / "README.md").read_text()
    assert card.index("](perplexity-calibration.png)") < card.index("## Recipe\n")
    section = card[card.index("## Evaluation\n") : card.index("## Recipe\n")]
    assert " original |" in section and " big |" in section and " small |" not in section
    assert f"Made by `mha2mla eval {folders[0]}" in section

    # Once, however often it is measured; what stands around it stays.
    assert main(command) == 0
    assert (big / "README.md").read_text() == card
    assert card.count("## Evaluation\n") == 1 and card.endswith("[mha2mla]: https://arxiv.org/abs/2502.14837\n")
    source = next(conversions.glob("source-*"))
    assert not list(source.glob("*.png")) and not (source / "README.md").exists()
    # Our own pictures are no reason to keep an earlier output.
    options = ("--cache-ratio", 0.5, "--refine-steps", 1, "--data", calibration_file, *TEXT, "--overwrite")
    assert main(["convert", str(source), str(big), *map(str, options)]) == 0
    assert not list(big.glob("*.png"))


def test_names_of_files_are_no_html(tmp_path):
    numbers = {"kl": 0.1, "kl_stderr": 0.1, "top1": 1.0, "matched_tokens": 1.0, "identical": 1.0}
    task = of_items("agreement", "", numbers)["task"]
    run = {"command": "mha2mla eval", "environment": {"versions": {}, "commit": None, "device": "CPU"}}
    results = Results({}, [run], [row("converted", {"agreement:a<b>": task})])
    write_page(tmp_path, results)
    page = (tmp_path / "report.html").read_text()
    assert "agreement:a&lt;b&gt;" in page and "a<b>" not in page


def test_without_its_source_and_its_name_a_conversion_is_refused(conversions, calibration_file, capsys):
    path = conversions / "big" / "conversion.json"
    record = json.loads(path.read_text())
    del record["source"]
    path.write_text(json.dumps(record))
    assert main(["eval", str(conversions / "big"), "--data", str(calibration_file)]) == 2
    assert f"conversion.json of {conversions / 'big'} has no 'source': convert again" in capsys.readouterr().err


def test_without_its_source_a_conversion_is_measured_alone(conversions, calibration_file, capsys):
    next(conversions.glob("source-*")).rename(conversions / "moved")
    command = ["eval", str(conversions / "big"), "--length", "16", "--limit", "2", "--output", str(conversions / "r")]
    assert main([*command, "--data", str(calibration_file)]) == 0
    assert " original |" not in capsys.readouterr().out
    names = [row["name"] for row in json.loads((conversions / "r" / "results.json").read_text())["models"]]
    assert names == ["big"]
    agreement = ["--data", str(calibration_file), "--tasks", "agreement:calibration"]
    assert main([*command, *agreement]) == 2
    assert "agreement:calibration compares with the original, which is not here" in capsys.readouterr().err


def test_results_in_the_form_of_the_hub(models, sets, tmp_path, capsys):  # noqa: F811
    command = arguments(models, sets, tmp_path, "--benchmarks", "choices=me/choices:test", tasks="choices,texts")
    assert main(command) == 0
    file = tmp_path / "half" / ".eval_results" / "choices.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))  # the Hub's own reading
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert entry.value == pytest.approx(
        100 * results["models"][1]["tasks"]["choices"]["numbers"]["accuracy"], abs=0.01
    )
    assert (entry.dataset_id, entry.task_id) == ("me/choices", "test")
    assert isinstance(entry.date, str) and results["runs"][0]["started"].startswith(entry.date)
    assert [path.name for path in tmp_path.glob("*/.eval_results")] == [".eval_results"]  # not of the original
    assert ".eval_results/choices.yaml" in {upload.name for upload in plan_upload(tmp_path / "half")}
    capsys.readouterr()
    for given, message in (
        (("choices",), "write TASK=OWNER/NAME:TASK_ID"),
        (("texts=me/choices:test",), "no task of this run that has an accuracy"),
        (("choices=me/choices:test", "--limit", "2"), "wants the whole set: leave out --limit 2"),
    ):
        assert main(arguments(models, sets, tmp_path, "--benchmarks", *given, tasks="choices,texts")) == 2
        assert message in capsys.readouterr().err


def test_text_of_any_form_is_the_same_text(save_source, tmp_path, capsys):
    source, texts = save_source(), [words(12, seed) for seed in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"raw": text}) + "\n" for text in texts))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"raw": text}) + "\n" for text in [*texts[:1], "", *texts[1:]]))
    (tmp_path / "c.txt").write_text("\n\n".join(texts))
    losses = []
    for name, column in (("a.jsonl", "raw"), ("b.jsonl.gz", "raw"), ("c.txt", "text")):
        output = tmp_path / f"of-{name}"
        data = ("--data", str(tmp_path / name), "--column", column, "--output", str(output))
        assert main(["eval", str(source), *data, "--length", "16"]) == 0
        (row,) = json.loads((output / "results.json").read_text())["models"]
        (task,) = row["tasks"].values()
        assert list(row["tasks"]) == [name[0]]
        losses.append(task["numbers"]["loss"])
    assert losses[0] == losses[1] == losses[2]
    capsys.readouterr()
    for data, message in (
        (("owner/set",), "owner/set is a data set on the Hub: say by --limit"),
        ((str(tmp_path / "b.jsonl.gz"),), "has no column 'text'; it has raw"),
        ((str(tmp_path / "d.txt"),), "d.txt. Check the path."),
    ):
        assert main(["eval", str(source), "--data", *data]) == 2
        assert message in capsys.readouterr().err
