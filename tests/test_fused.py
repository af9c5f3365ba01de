"""Experts are read as files hold them, one by one or those of a layer in one tensor, and passed on as they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mha2mla.cli.main import main
from mha2mla.conversion.checkpoint import CheckpointReader
from mha2mla.conversion.fused import FusedReader, open_checkpoint
from pico import make_source

EXPERT = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
ARGUMENTS = ["--preset", "paper", "--rope-selection", "uniform", "--cache-ratio", "0.5", "--max-shard-size", "20KB"]


@pytest.fixture
def source(save_source):
    return save_source("mixtral", max_shard_size="20KB")


def convert(source, out):
    return main(["convert", str(source), str(out), *ARGUMENTS])


def rewrite(source, change):
    """The same checkpoint in one file, its tensors as `change` returns them."""
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (source / "model.safetensors.index.json").unlink()
    save_file(change(tensors), source / "model.safetensors")


def test_parts_in_several_files_are_read_as_transformers_loads_them(source):
    config = AutoConfig.from_pretrained(source)
    reader = open_checkpoint(source, config)
    assert EXPERT in reader.reader and len(set(reader.reader.files.values())) > 2
    expected = make_source("mixtral").state_dict()
    headers = reader.headers()
    assert headers.keys() == expected.keys()
    for name, tensor in expected.items():
        assert name in reader and headers[name] == (list(tensor.shape), "F32")
        assert torch.equal(reader.get(name), tensor)
    layer = reader.with_prefix("model.layers.1.")
    assert layer.keys() == {n.removeprefix("model.layers.1.") for n in expected if n.startswith("model.layers.1.")}


def test_ten_experts_are_stacked_by_number(tmp_path):
    weights = {f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight": torch.full((2, 3), i) for i in range(11)}
    save_file(weights, tmp_path / "model.safetensors")
    config = AutoConfig.for_model("mixtral")
    fused = open_checkpoint(tmp_path, config).get("model.layers.0.mlp.experts.down_proj")
    assert fused[:, 0, 0].tolist() == list(range(11))


def test_both_layouts_of_files_give_the_same_and_experts_stay_as_they_are(source, tmp_path):
    assert convert(source, tmp_path / "parts") == 0
    rewrite(source, lambda tensors: make_source("mixtral").state_dict())
    assert isinstance(open_checkpoint(source, AutoConfig.from_pretrained(source)), FusedReader)
    assert convert(source, tmp_path / "whole") == 0
    of_parts, of_whole = CheckpointReader(tmp_path / "parts"), CheckpointReader(tmp_path / "whole")
    assert of_parts.files.keys() == of_whole.files.keys()
    for name in of_parts.files:
        assert torch.equal(of_parts.get(name), of_whole.get(name))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    experts = {name: tensor for name, tensor in make_source("mixtral").state_dict().items() if ".mlp." in name}
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in experts.items())
    # What transformers saves of it is what was read.
    loaded.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == of_parts.files.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {n: w for n, w in t.items() if n != EXPERT}, "7 parts of model.layers.0.mlp.experts.gate_up_proj"),
        (lambda t: {n: w for n, w in t.items() if ".experts.3." not in n}, "gate_up_proj has shape [3, 128, 48], but"),
        (lambda t: t | {EXPERT: t[EXPERT][:5].clone()}, "do not fit together"),
        (lambda t: t | {EXPERT: t[EXPERT] * float("nan")}, f"{EXPERT} holds NaN"),
    ],
)
def test_incomplete_experts_are_refused(change, message, source, tmp_path, capsys):
    rewrite(source, change)
    assert convert(source, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_converted_mixture_is_told_from_a_source(source, tmp_path, capsys):
    assert convert(source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mla_mixtral"
    assert convert(tmp_path / "out", tmp_path / "again") == 2
    assert "converted already" in capsys.readouterr().err
