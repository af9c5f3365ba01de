"""Checkpoints of every format version, saved when it was new, load with today's code and with their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mha2mla.modeling import MLALlamaForCausalLM
from mha2mla.modeling.latent_config import FORMAT_VERSION
from pico import BLOCK_PACKAGE, LAYOUTS

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = [f"v{version}-{layout}" for version in range(1, FORMAT_VERSION + 1) for layout in LAYOUTS]
CACHES = [{}, dict(cache_implementation="static", disable_compile=True), dict(use_cache=False)]


def assert_answers_as_when_it_was_saved(model, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
    for cache in CACHES:
        tokens = model.generate(expected["ids"], max_new_tokens=12, min_new_tokens=12, do_sample=False, **cache)
        assert tokens.tolist() == expected["tokens"].tolist(), cache


@pytest.mark.parametrize("name", NAMES)
def test_with_the_code_of_the_package(name):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    assert type(model) is MLALlamaForCausalLM
    assert_answers_as_when_it_was_saved(model, CHECKPOINTS / name)


CLEAN_LOAD = (
    BLOCK_PACKAGE
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
ids = torch.tensor(eval(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits
for cache in eval(sys.argv[3]):
    tokens = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **cache)
    assert tokens.tolist() == eval(sys.argv[4]), cache
save_file({"logits": logits}, "logits.safetensors")
"""
)


@pytest.mark.parametrize("name", NAMES)
def test_with_the_code_that_lay_beside_it(name, tmp_path):
    shutil.copytree(CHECKPOINTS / name, tmp_path / name)
    shutil.copytree(CHECKPOINTS / f"{name.split('-')[0]}-code", tmp_path / name, dirs_exist_ok=True)
    expected = load_file(CHECKPOINTS / name / "expected.safetensors")
    arguments = [tmp_path / name, expected["ids"].tolist(), CACHES, expected["tokens"].tolist()]
    # One thread, as here: sums over several are added in another order.
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", CLEAN_LOAD, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
