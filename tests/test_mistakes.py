"""What users get wrong on the command line: each command ends in a sentence that names the value, leaving nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import pico_tokenizer
from safetensors.torch import load_file, save_file

from mha2mla.cli.main import main
from mha2mla.common.records import RECORD_NAME
from pico import make_mla, make_source

TEXT = "".join(json.dumps({"text": " ".join(f"w{4 + (i * j) % 90}" for j in range(40))}) + "\n" for i in range(12))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for model, name in ((make_source("gqa"), "source"), (make_mla("shared"), "mla")):
        model.save_pretrained(folder / name)
        pico_tokenizer().save_pretrained(folder / name)
    (folder / "text.jsonl").write_text(TEXT)
    (folder / "list.yaml").write_text("preset: [paper]\n")
    (folder / "rates.yaml").write_text("learning_rate: [1, 2]\n")
    return folder


CONVERT = ("convert", "source", "out", "--preset", "paper", "--rope-selection", "high")
SIZES = ("--kv-lora-rank", "12", "--qk-rope-head-dim", "4")
EVAL = ("eval", "source", "mla", "--data", "text.jsonl", "--output", "out")
TRAIN = ("train", "--model", "mla", "--data", "text.jsonl", "--length", "8", "--max_steps", "1", "--use_cpu")
TRAIN += ("--report_to", "none", "--output", "out")


@pytest.mark.parametrize(
    "command, message",
    [
        ((*CONVERT, *SIZES, "--max-shard-size", "2 potatoes"), "max_shard_size='2 potatoes' must be a size above 0"),
        ((*CONVERT, *SIZES, "--max-shard-size", "0"), "max_shard_size='0' must be a size above 0"),
        ((*CONVERT, *SIZES, "--seed=-1"), "seed=-1 must lie between 0 and 4294967295"),
        ((*CONVERT, *SIZES, "--gguf-file", "x.gguf"), "There is no file source/x.gguf"),
        (("convert", "a model!/x", *CONVERT[2:], *SIZES), "There is no folder or .gguf file a model!/x"),
        (("convert", "my-llama", "out", *SIZES, "--data", "text.jsonl"), "There is no folder or .gguf file my-llama"),
        (("convert", "source", "out", "--config", "list.yaml"), "preset: ['paper'] does not fit"),
        (("export", "a model!/x", "out"), "There is no folder or .gguf file a model!/x"),
        (("convert", "source/config.json", "out", *SIZES, "--data", "text.jsonl"), "no folder or .gguf file source/"),
        # Before anything is asked of the Hub.
        (("convert", "some/model", "out", *SIZES, "--data", "none.jsonl"), "There is no file none.jsonl"),
        (("plan", "source/config.json"), "is a file. Give the folder"),
        ((*CONVERT, "--cache-ratio", "31"), "For 31 %, give 0.31."),
        (("export", "mla", "out.gguf"), "Add --format gguf"),
        (("export", "mla", "out", "--max-shard-size", "x"), "max_shard_size='x' must be a size above 0"),
        ((*EVAL, "--new-tokens", "0"), "new_tokens=0 must be at least 1"),
        ((*EVAL, "--seed", "-1"), "seed=-1 must lie between"),
        ((*EVAL, "--data", "nowhere.jsonl"), "There is no file nowhere.jsonl"),
        (("push", "mla", "a b"), "'a b' is no name on the Hub"),
        (
            (*TRAIN, "--attn_implementation", "flex_attention"),
            "trains on a GPU only. On a CPU: --use_cpu --bf16 false",
        ),
        ((*TRAIN, "--data", "txet.jsonl"), "There is no file txet.jsonl. Did you mean text.jsonl?"),
        ((*TRAIN, "--learning_rate", "nan"), "learning_rate=nan must be at least 0"),
        ((*TRAIN, "--per_device_train_batch_size", "0"), "per_device_train_batch_size=0 must be at least 1"),
        ((*TRAIN, "--gradient_accumulation_steps", "0"), "gradient_accumulation_steps=0 must be at least 1"),
        ((*TRAIN, "--seed", str(2**40)), "must lie between 0 and 4294967295"),
        ((*TRAIN, "--trainable", "lora", "--lora_dropout", "2"), "lora_dropout=2.0 must lie between 0 and 1"),
        ((*TRAIN, "--report_to", "abacus"), "report_to='abacus' is not installed"),
        ((*TRAIN, "--label_smoothing_factor", "0.1"), "label_smoothing_factor=0.1 belongs to"),
        ((*TRAIN, "--remove_unused_columns"), "remove_unused_columns must stay off"),
        ((*TRAIN, "--eval_fraction", "0.99"), "eval_fraction=0.99 of the 12 documents of text.jsonl"),
        ((*TRAIN, "--config", "rates.yaml"), "learning_rate: [1, 2] does not fit"),
        ((*TRAIN, "--output", ""), "output_dir is empty"),
        ((*TRAIN, "--output", "source/../mla"), "is the model, which would be lost"),
        ((*TRAIN, "--output", "source", "--teacher", "source"), "is the teacher, which would be lost"),
    ],
)
def test_mistakes_end_in_a_sentence(command, message, inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    assert main(list(command)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"mha2mla {command[0]}: error: ") and message in told
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("recorded", [True, False])
def test_a_model_has_nothing_to_learn_from_itself(recorded, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    shutil.copytree("mla", tmp_path / "mla")
    if recorded:
        (tmp_path / "mla" / RECORD_NAME).write_text('{"source": "me/llama"}')
    (tmp_path / "link").symlink_to("mla")
    assert main([*TRAIN, "--model", str(tmp_path / "link"), "--teacher", str(tmp_path / "." / "mla")]) == 2
    remedy = "that it was converted from: --teacher me/llama." if recorded else "that it was converted from."
    told = capsys.readouterr().err.strip()
    assert "is the model itself, from which there is nothing to learn" in told and told.endswith(remedy)


def test_bf16_without_a_gpu_says_what_to_take_back(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert main([word for word in TRAIN if word != "--use_cpu"] + ["--bf16"]) == 2
    assert "there is none. To try it on a CPU: --use_cpu --bf16 false" in capsys.readouterr().err


@pytest.mark.parametrize("command", [TRAIN, (*CONVERT[:5], *SIZES, "--data", "text.jsonl", "--length", "8")])
def test_a_cache_that_cannot_be_written_is_not_the_texts_fault(command, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    assert main([*command, *(["--streaming"] if command is TRAIN else [])]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.endswith(f"{home}: Not a directory. Set HF_HOME to a folder that you can write to.")


def test_a_file_of_chats_needs_no_column(inputs, tmp_path):
    chat = {"messages": [{"role": "user", "content": "w4 w5 w6 w7"}, {"role": "assistant", "content": "w8 w9"}]}
    (tmp_path / "chats.jsonl").write_text(20 * (json.dumps(chat) + "\n"))
    command = ["convert", str(inputs / "source"), str(tmp_path / "out"), "--preset", "paper", *SIZES]
    assert main([*command, "--data", str(tmp_path / "chats.jsonl"), "--samples", "2", "--length", "8"]) == 0


def without(source: Path, folder: Path, name: str, **more: torch.Tensor) -> Path:
    """A checkpoint without one of its tensors, and with others."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["kv_b_proj.weight", "rope_frequencies"])
def test_weights_that_are_missing_are_never_drawn_at_random(name, inputs, tmp_path, monkeypatch, capsys):
    name = f"model.layers.1.self_attn.{name}"
    torn, text = str(without(inputs / "mla", tmp_path / "torn", name)), str(inputs / "text.jsonl")
    monkeypatch.chdir(tmp_path)
    for command in (
        ["eval", str(inputs / "source"), torn, "--data", text, "--length", "8"],
        ["bench", torn, "--contexts", "8"],
        ["export", torn, "out"],
        [*TRAIN, "--model", torn, "--data", text],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "lacks" in error.splitlines()[-1] and name in error.splitlines()[-1]


def test_two_sets_of_weights_are_refused(inputs, tmp_path, capsys):
    """transformers loads model.safetensors, and not what the index beside it names."""
    folder = shutil.copytree(inputs / "source", tmp_path / "both")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "part.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["convert", str(folder), str(tmp_path / "out"), *CONVERT[3:], *SIZES]) == 2
    assert "which transformers loads, and model.safetensors.index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model.safetensors.index.json", b"{}", "is malformed. Save the model again."),
        ("model.safetensors", b"xx", "cannot be read"),
        ("README.md", b"caf\xe9", "is not UTF-8 text"),
        ("config.json", b'{"auto_map": [1]}', "is malformed. Save the model again."),
        ("config.json", b'{"auto_map": {"AutoConfig": 3}}', "is malformed. Save the model again."),
        ("adapter_config.json", b"{}", "names no base model"),
    ],
)
def test_malformed_folders_are_not_pushed(file, content, message, inputs, tmp_path, capsys):
    folder = shutil.copytree(inputs / "mla", tmp_path / "model")
    (folder / file).write_bytes(content)
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 2
    assert message in capsys.readouterr().err
