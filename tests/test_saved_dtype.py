"""A model of 16 bits comes out of training with 16 bits, as whole files or as shards."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_training_run import arguments, cache, folder  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM

from mha2mla.cli.main import main
from mha2mla.training.saved_dtype import restore_dtype
from pico import make_mla


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_run_leaves_the_type_of_its_model(trainable, folder):  # noqa: F811
    make_mla("shared").bfloat16().save_pretrained(folder / "mla")
    merge = ("--merge",) if trainable == "lora" else ()
    assert main(arguments(folder, "out", "--trainable", trainable, *merge)) == 0
    whole = folder / "out" / "merged" if merge else folder / "out"
    weights = load_file(whole / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(whole).dtype == torch.bfloat16
    if not merge:  # what goes on from a checkpoint needs all of it
        checkpoint = max(whole.glob("checkpoint-*"))
        assert load_file(checkpoint / "model.safetensors")["lm_head.weight"].dtype == torch.float32


def test_shards_and_what_was_saved_before(tmp_path):
    model = make_mla("shared")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for dtype in (torch.float32, None):
        restore_dtype(tmp_path, dtype)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    restore_dtype(tmp_path, torch.float16)
    restore_dtype(tmp_path, torch.bfloat16)  # nothing is in float32 any more
    assert set(before) == {file.name for file in tmp_path.iterdir()} and len(before) > 4
    size = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert size == sum(t.nbytes for file in tmp_path.glob("*.safetensors") for t in load_file(file).values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float16
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name].to(weight.dtype), rtol=0, atol=0)
