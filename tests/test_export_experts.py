"""A mixture of experts in DeepSeek's terms: what engines compute with it, by the class of transformers that does."""

import json
import re
import sys

import pytest
import torch
from conftest import pico_tokenizer
from transformers import AutoModelForCausalLM

from mha2mla.cli.main import main
from mha2mla.common.loading import load_model
from mha2mla.conversion.checkpoint import CheckpointReader
from mha2mla.conversion.export import ExportConfig, check, export
from pico import make_mla, tokens


@pytest.fixture
def save(tmp_path):
    """Save a random model whose layers use these frequencies; gives it and its folder."""

    def save(frequencies):
        model = make_mla("mla_mixtral", qk_rope_head_dim=2 * len(frequencies), num_local_experts=4, rms_norm_eps=1e-5)
        for layer in model.model.layers:
            layer.self_attn.rope_frequencies.copy_(torch.tensor(frequencies)[None])
        model.save_pretrained(tmp_path / "model")
        pico_tokenizer().save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return save


def test_the_check_is_of_our_logits(save, tmp_path, monkeypatch):
    compared = []
    compare = check.compare_logits
    module = sys.modules["mha2mla.conversion.export.run"]
    monkeypatch.setattr(module, "compare_logits", lambda *x: compared.append(x) or compare(*x))
    model, folder = save([0, 1, 4])
    export(folder, tmp_path / "out", ExportConfig(pad=256, max_shard_size="20KB"))
    ((ours, exported),) = compared
    ids = check.check_ids(folder, model.config)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
    assert (ours - exported).abs().max() <= 2e-5 * ours.abs().max()


@pytest.mark.parametrize("frequencies", [[0, 1, 2], [0, 2, 4], [0, 1, 4, 5]])  # the last needs yarn's step
def test_what_is_written(frequencies, save, tmp_path, caplog):
    model, folder = save(frequencies)
    export(folder, tmp_path / "out")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[-1].startswith("Not for transformers' own DeepSeek-V2")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("deepseek_v2", ["DeepseekV2ForCausalLM"])
    said = ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor")
    assert [config[name] for name in said] == ["softmax", "greedy", True, 1, 1, 1.0]
    assert (config["n_routed_experts"], config["n_shared_experts"], config["first_k_dense_replace"]) == (4, 1, 0)
    reader = CheckpointReader(tmp_path / "out")
    fused = model.model.layers[1].mlp.experts
    for index in range(4):
        prefix = f"model.layers.1.mlp.experts.{index}."
        gate, up = fused.gate_up_proj[index].chunk(2)
        assert torch.equal(reader.get(prefix + "gate_proj.weight"), gate)
        assert torch.equal(reader.get(prefix + "up_proj.weight"), up)
    assert not any("gate_up_proj" in name for name in reader.files)
    assert not any(tensor.any() for tensor in reader.with_prefix("model.layers.1.mlp.shared_experts.").values())
    # transformers loads it too, but its own class forgets to renormalise: the card says so.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        got, expected = (m(tokens(2, 9)).logits for m in (loaded, model))
    assert (got - expected).abs().max() > 1e-2 * expected.abs().max()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stock DeepSeek-V2 checkpoint" in card and "Not for transformers' own DeepSeek-V2" in card
    assert "from_pretrained" not in card


def test_transformers_is_kept_from_running_it(save, tmp_path, capsys, monkeypatch):
    """What it would say is not what the model says; before anything is measured, and before weights are read."""
    _, folder = save([0, 1, 2])
    export(folder, tmp_path / "out")
    (tmp_path / "texts.jsonl").write_text('{"id": "0", "text": "w5 w6 w7"}\n')
    both = [str(folder), str(tmp_path / "out")]
    message = "model: .*out is a mixture of experts with norm_topk_prob=True, .* Give the converted model"
    with pytest.raises(ValueError, match=message):
        load_model(both[1])
    assert main(["chat", both[1], "--prompt", "w5"]) == 2
    monkeypatch.setattr("mha2mla.evaluation.run.load_model", None)
    data = ["--data", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "results")]
    assert main(["eval", *both, *data]) == 2
    assert len(re.findall(message, capsys.readouterr().err)) == 2


def test_other_formats_refuse_experts(save, tmp_path, capsys):
    _, folder = save([0, 1, 2])
    assert main(["export", str(folder), str(tmp_path / "out.gguf"), "--format", "gguf"]) == 2
    assert "num_local_experts=4: files for llama.cpp are written of dense models only" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "back"), "--format", "mla-llama"]) == 2
    assert "mixtures of experts, which do not come back" in capsys.readouterr().err
