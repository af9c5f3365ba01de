"""Cards of converted and trained models: what they take over, and code that runs as it stands."""

import os
import re
import subprocess
import sys

import pytest
from conftest import pico_tokenizer
from huggingface_hub import metadata_load

from mha2mla.cli.main import main
from mha2mla.common.cards import card_metadata, fine_tuning, usage, write_card
from mha2mla.training import add_lora
from mha2mla.training.publish import plan_upload
from pico import BLOCK_PACKAGE, make_mla

SOURCE_CARD = """---
license: other
license_name: llama3.1
license_link: LICENSE
language:
- en
- de
datasets: owner/texts
base_model: owner/original
tags: [gone]
---
# source
"""


@pytest.mark.parametrize("adapter", [False, True])
def test_the_snippet_runs_as_it_stands_without_this_package(adapter, tmp_path):
    name = "my-model.v1"
    make_mla("shared").save_pretrained(tmp_path / "base" if adapter else tmp_path / name)
    pico_tokenizer().save_pretrained(tmp_path / name)
    if adapter:
        model = make_mla("shared").from_pretrained(tmp_path / "base")
        add_lora(model, 2, 4, 0.0, ["q_proj", "kv_b_proj"]).save_pretrained(tmp_path / name)
    write_card(tmp_path / name / "README.md", name, card_metadata("owner/base"), usage(name, adapter))
    code = re.search(r"```python\n(.*?)```", (tmp_path / name / "README.md").read_text(), re.DOTALL)[1]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", BLOCK_PACKAGE + code]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("form", ["shared", "mla_qwen3"])
def test_the_targets_of_lora_are_those_of_the_model(form, tmp_path):
    """A checkpoint's own code does not tell peft of its default targets, and the usual four are not here."""
    model = make_mla(form)
    model.save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    section = fine_tuning(model.config.attention_projections)
    assert ("There is no `k_proj` and no `v_proj`" in section) == (form == "shared")
    write_card(tmp_path / "README.md", "model", card_metadata("owner/base"), f"{usage('model')}\n\n{section}")
    code = "".join(re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL))
    tell = "print(*sorted({name.split('.')[-1] for name in model.targeted_module_names}))"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", BLOCK_PACKAGE + code + tell]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == sorted(model.config.attention_projections)


def test_licence_languages_and_data_sets_are_taken_over(tmp_path):
    (tmp_path / "README.md").write_text(SOURCE_CARD)
    data = card_metadata(str(tmp_path), datasets=["owner/more", "owner/texts"]).to_dict()
    assert {name: data[name] for name in ("license", "license_name", "license_link", "language")} == {
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "LICENSE",
        "language": ["en", "de"],
    }
    assert data["datasets"] == ["owner/texts", "owner/more"]
    assert (data["base_model"], data["base_model_relation"]) == ("owner/original", "finetune")
    assert "mha2mla" in data["tags"] and "gone" not in data["tags"]
    adapter = card_metadata(str(tmp_path), "adapter", library_name="peft").to_dict()
    assert (
        adapter["license"] == "other" and "base_model" not in adapter
    )  # it fits the folder's model, not the original
    of_hub = card_metadata("owner/model").to_dict()  # which is not reached here
    assert (of_hub["base_model"], of_hub["base_model_relation"]) == ("owner/model", "finetune")
    assert "license" not in of_hub and "datasets" not in of_hub
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in card_metadata(str(tmp_path)).to_dict()


def test_the_cards_of_a_conversion_carry_the_licence_of_its_source(save_source, calibration_file, tmp_path):
    source, out = save_source(), tmp_path / "out"
    (source / "README.md").write_text(SOURCE_CARD)
    options = ["--preset", "paper", "--cache-ratio", "0.5", "--rope-selection", "uniform"]
    assert main(["convert", str(source), str(out), *options]) == 0
    data = metadata_load(out / "README.md")
    assert (data["license"], data["license_name"], data["base_model"]) == ("other", "llama3.1", "owner/original")
    text = (out / "README.md").read_text()
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (out / "NOTICE").write_text("Built with Llama")
    uploads = {upload.name: upload.content for upload in plan_upload(out, repo="me/mla")}
    assert {"NOTICE", "additional_chat_templates/tools.jinja", "conversion.json"} <= set(uploads)
    assert 'targets = ["q_proj", "kv_a_proj", "kv_b_proj", "o_proj"]' in text
    assert text.count('from_pretrained("out", trust_remote_code=True)') == 2
    assert uploads["README.md"].decode() == text.replace('from_pretrained("out"', 'from_pretrained("me/mla"')
