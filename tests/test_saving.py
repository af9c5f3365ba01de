"""Saved checkpoints load anywhere: in a process that has only torch and transformers, in any dtype."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM, MLALlamaModel
from mha2mla.modeling.latent_config import FORMAT_VERSION
from pico import BLOCK_PACKAGE, CODE_FILES, FORMS, make_mla, tokens

CLEAN_LOAD = (
    BLOCK_PACKAGE
    + """
import json
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
assert type(model).__module__.startswith("transformers_modules."), type(model)
base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    logits = model(ids).logits
    hidden = base(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), logits)
new = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
model.save_pretrained(sys.argv[3])
torch.save({"logits": logits, "tokens": new.sequences, "bytes": sum(l.nbytes for l in new.past_key_values.layers)},
           sys.argv[3] + "/result.pt")
assert "mha2mla" not in sys.modules
"""
)


def load_in_clean_process(folder, ids, tmp_path):
    """Logits and tokens from a process that cannot import the package, with its own module cache."""
    resaved = tmp_path / "resaved"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [sys.executable, "-c", CLEAN_LOAD, str(folder), json.dumps(ids.tolist()), str(resaved)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(resaved / "result.pt"), resaved


@pytest.mark.parametrize("form", FORMS)
def test_clean_process_loads_equal_logits_and_saves_it_whole_again(form, tmp_path):
    model = make_mla(form)
    model.save_pretrained(tmp_path / "model")
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(ids).logits
    result, resaved = load_in_clean_process(tmp_path / "model", ids, tmp_path)
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=1e-6)
    assert result["bytes"] == 2 * (7 + 3) * 2 * model.config.latent_cache_dim * 4
    # What the process without the package saved is as complete as the first checkpoint.
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert names <= {p.name for p in resaved.iterdir()}
    again, _ = load_in_clean_process(
        resaved, ids, tmp_path / "again" if (tmp_path / "again").mkdir() is None else None
    )
    torch.testing.assert_close(again["logits"], expected, rtol=0, atol=1e-6)


def test_every_auto_class_is_registered_and_mapped(tmp_path):
    model = make_mla()
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    assert type(AutoConfig.from_pretrained(tmp_path)) is MLALlamaConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is MLALlamaModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MLALlamaForCausalLM


def test_modeling_folder_needs_torch_and_transformers_only(tmp_path):
    """Flat, sibling imports only: what transformers copies is what a stranger can run."""
    make_mla().save_pretrained(tmp_path)
    code = sorted(p.name for p in tmp_path.glob("*.py"))
    assert code == CODE_FILES
    for name in code:
        for line in (tmp_path / name).read_text().splitlines():
            if line.startswith(("import ", "from ")):
                root = line.split()[1].split(".")[0]
                assert root in ("", "torch", "transformers", "huggingface_hub") or root in sys.stdlib_module_names, (
                    line
                )


def test_frequencies_survive_and_bf16_keeps_tables_exact(tmp_path):
    model = make_mla(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    expected = [layer.self_attn.rope_frequencies.clone() for layer in model.model.layers]
    assert not torch.equal(expected[0], expected[1])
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype
        for layer, frequencies in zip(loaded.model.layers, expected, strict=True):
            assert layer.self_attn.rope_frequencies.dtype == torch.int64
            assert torch.equal(layer.self_attn.rope_frequencies, frequencies)
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_missing_frequencies_are_set_not_garbage(tmp_path):
    model = make_mla()
    state = {k: v for k, v in model.state_dict().items() if "rope_frequencies" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.rope_frequencies.tolist() == [[0, 1], [0, 1]]


def test_a_format_of_the_future_is_refused(tmp_path):
    make_mla().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mla_format_version"] == FORMAT_VERSION
    (tmp_path / "config.json").write_text(json.dumps(config | {"mla_format_version": FORMAT_VERSION + 1}))
    for load in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"reads versions up to 1\. Upgrade .* trust_remote_code=True"):
            load.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(qk_rope_head_dim=3), "qk_rope_head_dim must be even"),
        (dict(num_rope_key_heads=3), "num_rope_key_heads must be 1 .* or num_key_value_heads"),
        (dict(num_nope_key_heads=3), "num_nope_key_heads must be"),
        (dict(kv_lora_rank=0), "kv_lora_rank must be at least 1"),
        (dict(num_key_value_heads=3), "must be a multiple of num_key_value_heads"),
    ],
)
def test_config_errors_name_the_field(change, message):
    with pytest.raises(Exception, match=message):
        make_mla("shared", **change)
