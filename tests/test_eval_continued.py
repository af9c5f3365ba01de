"""Results that a second run of `mha2mla eval` goes on with: what may stand beside what."""

import json
import shutil
from pathlib import Path

from test_eval_command import arguments, models, sets  # noqa: F401 (fixtures)

from mha2mla.cli.main import main
from mha2mla.evaluation import run


def test_results_of_another_original_are_not_continued(models, sets, tmp_path, capsys):  # noqa: F811
    first, converted = models
    other = tmp_path / "other"
    shutil.copytree(first, other)
    assert main(arguments(models, sets, tmp_path, tasks="choices")) == 0
    before = (tmp_path / "results" / "results.json").read_text()
    assert main(arguments([str(other), converted], sets, tmp_path, tasks="choices")) == 2
    told = capsys.readouterr().err
    assert f"were measured against {first}, and now the original is {other}. Choose another --output" in told
    assert (tmp_path / "results" / "results.json").read_text() == before
    (tmp_path / "results" / "away").mkdir()  # another spelling of the same folders
    spelled = [str(tmp_path / "results" / "away" / ".." / ".." / Path(folder).name) for folder in models]
    assert main(arguments(spelled, sets, tmp_path, tasks="choices")) == 0
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["models"]
    assert [(row["name"], row["path"]) for row in rows] == [("original", spelled[0]), ("half", spelled[1])]


def test_results_are_continued_from_another_folder(models, sets, tmp_path, monkeypatch):  # noqa: F811
    folder, names = Path(models[0]).parent, [Path(path).name for path in models]
    monkeypatch.chdir(folder)
    assert main(arguments(names, sets, tmp_path, tasks="choices")) == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    monkeypatch.setattr(run, "measure_task", None)  # all is done
    assert main(arguments([f"../{name}" for name in names], sets, tmp_path, tasks="choices")) == 0
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["models"]
    assert [row["path"] for row in rows] == [f"../{name}" for name in names]


def test_agreement_is_measured_again_when_the_original_changed(models, sets, tmp_path, monkeypatch):  # noqa: F811
    measured = []
    measure_task = run.measure_task
    monkeypatch.setattr(
        run, "measure_task", lambda task, *args: measured.append(task.name) or measure_task(task, *args)
    )
    command = arguments(models, sets, tmp_path, tasks="completion,agreement:texts")
    assert main(command) == 0
    measured.clear()
    config = Path(models[0]) / "config.json"
    config.write_text(config.read_text() + "\n")
    assert main(command) == 0
    assert measured == ["completion", "agreement:texts"]  # the original's, and the conversion's with it
