"""What users get wrong in `mha2mla eval` that shows only beside a model: each ends in a sentence, nothing measured."""

import json

import pytest
from conftest import pico_tokenizer

from mha2mla.cli.main import main
from pico import make_source

ITEMS = {
    "text": [{"text": "w5 w6 extra"}],
    "choice": [{"context": "w5 w6", "choices": ["w7", "extra"], "answer": 0}],
    "retrieval": [{"context": "w5 extra w6", "target": " w7"}],
}


@pytest.fixture
def source(tmp_path):
    """A model whose tokenizer has a token more than it."""
    make_source("gqa").save_pretrained(tmp_path / "source")
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def evaluate(source, *more) -> int:
    output = source.parent / "results"
    return main(["eval", str(source), "--length", "16", "--output", str(output), *map(str, more)])


@pytest.mark.parametrize("name", ITEMS)
def test_a_token_that_the_model_does_not_know_is_named(name, source, tmp_path, capsys):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS[name]))
    assert evaluate(source, "--data", path) == 2
    error = capsys.readouterr().err
    assert f"{name}, as {source} reads it, has a token with the id 96, and the model knows vocab_size=96" in error
    path.write_text(path.read_text().replace("extra", "w9"))  # which nobody meets
    assert evaluate(source, "--data", path) == 0


def test_hidden_files_are_no_tasks(source, tmp_path, capsys):
    (tmp_path / "sets").mkdir()
    for name in ("._choices.jsonl", ".old.jsonl"):
        (tmp_path / "sets" / name).write_text("macOS's")
    assert evaluate(source, "--data", tmp_path / "sets") == 2
    assert "has no .jsonl or .json file" in capsys.readouterr().err
    (tmp_path / "sets" / "texts.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    assert evaluate(source, "--data", tmp_path / "sets") == 0
    (row,) = json.loads((tmp_path / "results" / "results.json").read_text())["models"]
    assert list(row["tasks"]) == ["texts"]


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_results_do_not_go_into_a_models_folder(command, source, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    more = ("--data", tmp_path / "text.jsonl", "--length", 8) if command == "eval" else ("--contexts", 8)
    before = sorted(source.iterdir())
    assert main([command, str(source), "--output", str(source), *map(str, more)]) == 2
    assert f"{source} holds a model: results would go up with it" in capsys.readouterr().err
    assert sorted(source.iterdir()) == before


def test_a_config_of_something_else_makes_no_model(source, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "config.json").write_text('{"port": 8080}')
    assert evaluate(source, "--data", tmp_path / "text.jsonl") == 0


def test_results_do_not_go_beside_an_adapter(source, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    (tmp_path / "results").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "results" / name).touch()
    assert evaluate(source, "--data", tmp_path / "text.jsonl") == 2
    assert "holds a model: results would go up with it" in capsys.readouterr().err
