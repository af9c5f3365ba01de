"""What `mha2mla push` uploads, and that it reaches a stand-in of the Hub's HTTP interface in one commit."""

import json

import pytest
import torch
from conftest import pico_tokenizer
from huggingface_hub import HfApi, constants

from hub import COMMIT, run_hub
from mha2mla.cli.main import main
from mha2mla.conversion.export import export
from mha2mla.training import add_lora
from mha2mla.training.publish import plan_upload, push_folder
from pico import CODE_FILES, make_mla, make_source

PROJECTIONS = ["q_proj", "kv_a_proj", "kv_b_proj", "o_proj"]
RUN_FILES = ("trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt")


@pytest.fixture
def model(tmp_path):
    """A trained model's folder, with what a run leaves beside the model."""
    folder = tmp_path / "model"
    make_mla().save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# model\n")
    for name in RUN_FILES:
        (folder / name).write_text("{}")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_text("")
    (folder / "._model.safetensors").write_text("macOS's")
    return folder


@pytest.fixture
def adapter(model, tmp_path):
    folder = tmp_path / "adapter"
    peft = add_lora(make_mla(), 2, 4, 0.0, PROJECTIONS)
    peft.peft_config["default"].base_model_name_or_path = str(model)
    peft.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with run_hub() as hub:
        yield hub


def api_of(hub):
    return HfApi(endpoint=hub.endpoint, token="hf_stand_in")


def test_dry_run_tells_what_users_would_miss(tmp_path, capsys):
    make_mla().save_pretrained(tmp_path)
    assert main(["push", str(tmp_path), "me/model", "--dry-run"]) == 0
    assert "Without a tokenizer and without a model card (README.md)" in capsys.readouterr().out


def test_dry_run_lists_a_model_and_nothing_of_its_run(model, capsys):
    assert main(["push", str(model), "me/model", "--dry-run"]) == 0
    listed = {line.split()[-1]: line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]}
    assert set(listed) == set(CODE_FILES) | {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: (model / name).stat().st_size for name in listed
    }


def test_a_model_goes_up_in_one_commit(model, hub):
    assert push_folder(model, "me/model", private=True, api=api_of(hub)).endswith(f"/me/model/commit/{COMMIT}")
    (created,), (files,) = hub.created, hub.commits
    assert created["name"] == "model" and created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert set(files) == {upload.name for upload in plan_upload(model)}
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_an_adapter_names_a_base_that_others_can_load(adapter, model, hub):
    with pytest.raises(ValueError, match=r"a folder that nobody else has. Push that first"):
        plan_upload(adapter)
    push_folder(adapter, "me/lora", base_model="me/model", api=api_of(hub))
    (files,) = hub.commits
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/model"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    assert "adapter_model.safetensors" in files


def test_an_export_goes_up(model, tmp_path):
    exportable = make_mla("shared")
    for layer in exportable.model.layers:
        layer.self_attn.rope_frequencies.copy_(torch.tensor([[0, 1]]))
    exportable.save_pretrained(model)
    export(model, tmp_path / "served")
    names = {upload.name for upload in plan_upload(tmp_path / "served")}
    assert {"config.json", "export.json", "model.safetensors", "tokenizer.json"} <= names
    (tmp_path / "served" / "export.json").unlink()
    with pytest.raises(ValueError, match="model_type='deepseek_v3': it is neither a converted model nor an export of"):
        plan_upload(tmp_path / "served")


def test_what_this_package_did_not_make_is_not_pushed(adapter, tmp_path, capsys):
    source = tmp_path / "source"
    make_source().save_pretrained(source)
    assert main(["push", str(source), "me/model", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert not said.out and f"{source} has model_type='llama': it is neither" in said.err
    assert f"Convert it first (`mha2mla convert`), or upload it as it is by `hf upload me/model {source}`." in said.err
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(source)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{adapter} is an adapter of {source}, which has model_type='llama'"):
        plan_upload(adapter, base_model="me/llama")


def test_a_file_is_uploaded_otherwise(tmp_path, capsys):
    (tmp_path / "model.gguf").write_text("")
    assert main(["push", str(tmp_path / "model.gguf"), "me/model"]) == 2
    assert f"It is a file: upload it by `hf upload me/model {tmp_path}/model.gguf`." in capsys.readouterr().err


def test_what_would_not_load_is_not_pushed(model, tmp_path, capsys):
    with pytest.raises(ValueError, match="--base-model belongs to adapters"):
        plan_upload(model, base_model="me/model")
    (model / "latent_cache.py").unlink()
    with pytest.raises(ValueError, match=r"lacks latent_cache\.py"):
        plan_upload(model)
    (model / "modeling_mla_llama.py").unlink()
    with pytest.raises(ValueError, match=r"lacks latent_cache\.py, modeling_mla_llama\.py"):
        plan_upload(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors weights"):
        plan_upload(model)
    assert main(["push", str(tmp_path / "nowhere"), "me/model"]) == 2
    assert "There is no folder" in capsys.readouterr().err
