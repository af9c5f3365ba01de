"""Weights that the config does not tell of, lacks, or tells wrong: said before any work, and never converted."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from mha2mla.cli.main import main
from pico import tokens

CALIBRATED = "--cache-ratio 0.5 --samples 6 --length 16 --refine-steps 0".split()
OPTIONS = "--preset paper --rope-selection high --qk-rope-head-dim 12 --kv-lora-rank 12".split()


def convert(source, output, *options) -> int:
    return main(["convert", str(source), str(output), *OPTIONS, *options])


def change(weights: dict, name: str, tensor) -> None:
    weights[name] = tensor


def poison(weights: dict, value: float) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value


DAMAGES = {
    "missing layer": (
        lambda w: [w.pop(n) for n in list(w) if n.startswith("model.layers.1.")],
        "lacks model.layers.1",
    ),
    "extra layer": (lambda w: change(w, "model.layers.2.mlp.up_proj.weight", torch.zeros(64, 48)), "layers.2.mlp"),
    "extra tensor": (lambda w: change(w, "model.vision.weight", torch.zeros(1)), "model.vision.weight"),
    "k_proj shape": (lambda w: change(w, "model.layers.0.self_attn.k_proj.weight", torch.zeros(5, 48)), r"\[5, 48\]"),
    "mlp shape": (lambda w: change(w, "model.layers.1.mlp.up_proj.weight", torch.zeros(60, 48)), r"\[60, 48\]"),
    "type": (lambda w: change(w, "model.norm.weight", torch.zeros(48, dtype=torch.int8)), "quantised"),
    "nan": (lambda w: poison(w, float("nan")), "holds NaN or infinity"),
    "inf": (lambda w: poison(w, float("-inf")), "holds NaN or infinity"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_weights_and_config_that_disagree_are_refused(case, save_source, tmp_path, capsys):
    source = save_source()
    damage, message = DAMAGES[case]
    weights = load_file(source / "model.safetensors")
    damage(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("kind", ["gqa", "mqa", "qwen3_moe"])  # "mqa" ties its embeddings
@pytest.mark.parametrize(
    "saved, held",
    [
        (AutoModel, "embed_tokens.weight without 'model.' before it"),
        (AutoModelForSequenceClassification, "score.weight, the head"),
        (AutoModelForTokenClassification, "score."),
    ],
)
def test_what_another_class_has_saved_is_named(saved, held, kind, save_source, tmp_path, capsys):
    source = save_source(kind)
    other = tmp_path / "other"
    saved.from_pretrained(source).save_pretrained(other)
    assert convert(other, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{other} holds {held}" in error
    if kind != "mqa":
        assert "and no lm_head.weight" in error and "Give the causal language model" in error
        return
    assert "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)" in error
    AutoModelForCausalLM.from_pretrained(other).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "again")
    wanted, again = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert wanted.keys() == again.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert convert(tmp_path / "again", tmp_path / "out") == 0


def test_an_incomplete_decoder_is_never_saved_again(save_source, tmp_path, capsys):
    """transformers would draw the rest at random."""
    source = save_source("mqa")
    AutoModel.from_pretrained(source).save_pretrained(source)
    weights = load_file(source / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out") == 2
    assert "lacks model.embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["paper", "calibrated"])
def test_tables_that_older_checkpoints_hold_are_passed_over(preset, save_source, calibration_file, tmp_path):
    """Llama 2's have them, and every version of transformers computes them."""
    source = save_source()
    weights = load_file(source / "model.safetensors")
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in (0, 1)}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    options = OPTIONS if preset == "paper" else ["--data", str(calibration_file), *CALIBRATED]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "inv_freq" in name]


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_counts_more_than_the_flag(same, save_source, tmp_path):
    """transformers unties where the file says so; the flag alone would drop the head."""
    source = save_source("mqa")  # its config ties
    weights = load_file(source / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() if same else embedding.flip(0).contiguous()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is same
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "out")]
    with torch.no_grad():
        first, second = (model(tokens(1, 12)).logits for model in models)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_weights_that_the_type_cannot_hold_are_refused(save_source, tmp_path, capsys):
    source = save_source()
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, tmp_path / "out", "--dtype", "float16") == 2
    assert "Choose --dtype bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "index",
    [
        "not json",
        "[]",
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": 3}}',
    ],
)
def test_malformed_indexes_are_refused(index, save_source, tmp_path, capsys):
    source = save_source()
    (source / "model.safetensors.index.json").write_text(index)
    assert convert(source, tmp_path / "out") == 2
    assert "is not an index of safetensors files" in capsys.readouterr().err


def test_a_truncated_file_is_refused(save_source, tmp_path, capsys):
    source = save_source()
    weights = source / "model.safetensors"
    for size in (0, 4, 100, weights.stat().st_size - 10):
        weights.write_bytes(weights.read_bytes()[:size] if size else b"")
        assert convert(source, tmp_path / "out") == 2
        assert "download it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"rope_type": "default", "rope_theta": 0.0}, "0, infinity or NaN"),
        ({"rope_type": "default", "rope_theta": -5.0}, "0, infinity or NaN"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}, "0, infinity or NaN"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}, "0, infinity or NaN"),
        ({"rope_type": "spiral", "rope_theta": 1e4}, "make no rotary table"),
        (
            {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
            | {"short_factor": [1.0], "long_factor": [1.0] * 6},
            "short_factor has 1 factors for 6 rotary pairs",
        ),
    ],
)
def test_rotary_tables_that_are_none_are_refused(parameters, message, save_source, tmp_path, capsys):
    source = save_source()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_parameters": parameters}))
    assert convert(source, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_the_folder_is_not_passed_over(save_source, tmp_path, capsys):
    source = save_source()
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "own/base", "peft_type": "LORA"}')
    assert convert(source, tmp_path / "out") == 2
    assert "holds an adapter" in capsys.readouterr().err
    (source / "config.json").unlink()
    for command in (["plan", str(source)], ["convert", str(source), str(tmp_path / "out"), *OPTIONS]):
        assert main(command) == 2
        assert "holds an adapter (adapter_config.json), which is no whole model. Merge" in capsys.readouterr().err


def test_weights_that_may_not_be_read_are_not_said_to_be_missing(save_source, tmp_path, monkeypatch, capsys):
    source = save_source()
    monkeypatch.setattr("os.access", lambda path, mode: path.suffix != ".safetensors")
    assert convert(source, tmp_path / "out") == 2
    assert "model.safetensors may not be read by you. Change its permissions" in capsys.readouterr().err
