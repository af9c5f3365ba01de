"""Conversion from folder to folder, through the command as users call it."""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mha2mla.cli.main import main
from mha2mla.common.records import copy_record
from mha2mla.common.text import load_blocks
from mha2mla.conversion import Calibrated, ConversionConfig, Paper, convert
from mha2mla.conversion.architectures import architecture_of
from mha2mla.conversion.cache_plan import unrotated_rows
from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.export import ExportConfig, export
from mha2mla.conversion.recovered import LOST, POINTS_LOST, SMALL, expectation
from mha2mla.conversion.rotary import head_dim, num_rotary_pairs
from mha2mla.conversion.search import TIE
from mha2mla.modeling import MLALlamaForCausalLM
from pico import SOURCES, make_source, tokens

FULL = ["--qk-rope-head-dim", "12", "--rope-selection", "high"]  # all pairs of the pico models' heads


def run(*arguments, preset="paper") -> int:
    return main(["convert", *map(str, arguments), "--preset", preset])


def logits(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    with torch.no_grad():
        return model(tokens(2, 20)).logits


@pytest.mark.parametrize("kind", [k for k in SOURCES if k != "head-dim"])
def test_full_rank_conversion_gives_the_sources_logits(kind, save_source, tmp_path):
    source, config = save_source(kind), SOURCES[kind]
    groups, rope = config.num_key_value_heads, 2 * num_rotary_pairs(config)
    rank = min(unrotated_rows(config, groups * rope) + groups * head_dim(config), config.hidden_size)
    sizes = ("--qk-rope-head-dim", rope, "--kv-lora-rank", rank, "--rope-selection", "high")
    assert run(source, tmp_path / "out", *sizes) == 0
    expected = logits(source)
    assert (logits(tmp_path / "out") - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_sharded_source_and_sharded_output(save_source, tmp_path):
    source = save_source("gqa", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert run(source, tmp_path / "out", *FULL, "--kv-lora-rank", 24, "--max-shard-size", "20KB") == 0
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert (logits(tmp_path / "out") - logits(source)).abs().max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_keeps_the_sources_dtype_unless_told(dtype, save_source, tmp_path):
    source = save_source("gqa", dtype=dtype)
    run(source, tmp_path / "same", *FULL, "--kv-lora-rank", 24)
    run(source, tmp_path / "fp32", *FULL, "--kv-lora-rank", 24, "--dtype", "float32")
    for name, expected in (("same", dtype), ("fp32", torch.float32)):
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            found = {file.get_tensor(k).dtype for k in file.keys() if "rope_frequencies" not in k}
        assert found == {expected}
        assert AutoConfig.from_pretrained(tmp_path / name).dtype == expected


@pytest.mark.parametrize("most, norms", [("bfloat16", "float32"), ("float32", "float16")])
def test_the_type_is_that_of_most_weights(most, norms, save_source, tmp_path):
    """Whatever the norms are stored in: neither is the output twice the size, nor are weights rounded."""
    source, out = save_source("mqa", dtype=getattr(torch, most)), tmp_path / "out"

    def mix(path):
        stored = load_file(path)
        mixed = {name: t.to(getattr(torch, norms)) if "norm" in name else t for name, t in stored.items()}
        save_file(mixed, path, metadata={"format": "pt"})

    def types(path):
        return {str(t.dtype) for t in load_file(path).values() if t.is_floating_point()}

    mix(source / "model.safetensors")
    assert run(source, out, *FULL, "--kv-lora-rank", 12) == 0
    assert types(out / "model.safetensors") == {f"torch.{most}"}
    mix(out / "model.safetensors")
    export(out, tmp_path / "exported")
    assert types(tmp_path / "exported" / "model.safetensors") == {f"torch.{most}"}


def test_output_folder_is_complete(save_source, calibration_file, tmp_path):
    source, out = save_source("llama-bias"), tmp_path / "out"
    assert run(source, out, "--cache-ratio", 0.5, "--data", calibration_file, "--samples", 4,
               "--length", 16, "--rope-selection", "2-norm") == 0  # fmt: skip
    record = json.loads((out / "conversion.json").read_text())
    assert record["options"]["cache_ratio"] == 0.5
    # 2-norm chose for each layer and head, and the checkpoint uses that choice.
    model = AutoModelForCausalLM.from_pretrained(out)
    for layer, measured in zip(model.model.layers, record["layers"], strict=True):
        assert layer.self_attn.rope_frequencies.tolist() == measured["rope_frequencies"]
    assert AutoTokenizer.from_pretrained(out)("w7 w8")["input_ids"] == [7, 8]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "w9"}], tokenize=False)
    assert model.generation_config.eos_token_id == 2
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card and "recovery training" in card and "2-norm" in card
    # Repeating it from its own record gives the same weights.
    convert(record["source"], tmp_path / "again", ConversionConfig.from_dict(record["options"]))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor)


@pytest.mark.parametrize("svd", ["joint", "split"])
@pytest.mark.parametrize("rule", ["high", "low", "uniform"])
def test_cache_ratio_is_met(svd, rule, save_source, tmp_path, caplog):
    source = save_source("mha")
    with caplog.at_level("INFO", logger="mha2mla"):
        run(source, tmp_path / "out", "--cache-ratio", 0.3125, "--svd", svd, "--rope-selection", rule)
    assert "96 -> 30 values per token and layer" in caplog.text  # 2 * 4 * 12 -> 0.3125 of it
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.latent_cache_dim == 30
    assert model.generate(tokens(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)


@pytest.mark.parametrize(
    "sizes, told",
    [
        (("--cache-ratio", 0.06), "That is 6.25 %"),
        (("--kv-lora-rank", 2, "--qk-rope-head-dim", 2), "That is 4.17 %"),
        (("--cache-ratio", 0.125), None),
        (("--kv-lora-rank", 10, "--qk-rope-head-dim", 2), None),
    ],
)
def test_a_cache_smaller_than_any_measured_is_warned_of(sizes, told, save_source, calibration_file, tmp_path, caplog):
    options = (*sizes, "--data", calibration_file, "--samples", 1000)  # which ends it before the work
    assert run(save_source("mha"), tmp_path / "out", *options, preset="calibrated") == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    remedy = "Take --cache-ratio 0.3125, or at least 0.125"
    assert warnings == ([] if told is None else [f"{told}, {SMALL}. {remedy}."])


def test_the_nearest_size_measured_is_quoted():
    told = {0.9: 31.25, 0.3: 31.25, 0.25: 31.25, 0.23: 18.75, 0.1875: 18.75, 0.15: 12.5, 0.1248: 12.5}
    for ratio, size in told.items():
        assert f" at {size:g} % of its cache" in expectation(ratio) and LOST[size] in expectation(ratio)
    assert set(told.values()) == set(POINTS_LOST)
    assert expectation(0.0625) == f"6.25 % is {SMALL}"


def test_impossible_ratios_are_refused_before_anything_is_read(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--cache-ratio", "1.5"]) == 2
    assert "cache_ratio=1.5 must lie between 0 and 1" in capsys.readouterr().err


def test_ratio_follows_the_papers_table():
    """d_h = 64, 3 key/value heads: 8 rotary dims and d_kv = 32, 16, 8 per head (paper, Table 1)."""
    source = type(SOURCES["gqa"])(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    for ratio, d_kv in ((0.3125, 32), (0.1875, 16), (0.125, 8)):
        plan = Paper().plan(architecture_of(source), CacheSizes(cache_ratio=ratio))
        assert (plan.kv_lora_rank, plan.qk_rope_head_dim) == (3 * d_kv, 8)
        assert plan.ratio == ratio


def test_no_svd_keeps_all_of_keys_and_values(save_source, tmp_path):
    run(save_source("gqa"), tmp_path / "out", "--svd", "none", "--qk-rope-head-dim", 4, "--rope-selection", "uniform")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.latent_cache_dim == 2 * 2 * 12


def test_existing_output_is_not_touched_without_overwrite(save_source, tmp_path, capsys):
    source, out = save_source(), tmp_path / "out"
    options = (*FULL, "--kv-lora-rank", 24)
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert run(source, out, *options) == 2
    assert "--overwrite" in capsys.readouterr().err
    # Not even with --overwrite, as no conversion made it.
    assert run(source, out, *options, "--overwrite") == 2
    assert "remove it yourself" in capsys.readouterr().err
    assert (out / "precious.txt").read_text() == "mine"
    other = tmp_path / "other"
    assert run(source, other, *options) == 0
    assert run(source, other, *options, "--overwrite") == 0
    assert type(AutoModelForCausalLM.from_pretrained(other)) is MLALlamaForCausalLM
    assert not list(tmp_path.glob(".other.*"))


def test_overwrite_deletes_nothing_that_the_command_did_not_write(save_source, tmp_path, capsys):
    """Nor a trained model, which has a copy of the conversion's record, and files of the same names."""
    source, out, trained = save_source(), tmp_path / "out", tmp_path / "trained"
    command = (*FULL, "--kv-lora-rank", 24, "--overwrite")
    assert run(source, out, *command) == 0
    shutil.copytree(out, trained)
    copy_record(out, trained)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    (out / "link").symlink_to(source)
    for folder, message in (
        (out, "did not write, and --overwrite will not delete it: link, notes. Choose"),
        (trained, "(conversion.json lists no files, as in a trained model, or one of an older version)"),
    ):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert run(source, folder, *command) == 2
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    shutil.rmtree(out / "notes")
    (out / "link").unlink()
    assert run(source, out, *command) == 0


@pytest.mark.parametrize("place", ["current", "mount", "locked"])
def test_a_folder_that_cannot_be_replaced_is_refused_at_once(place, save_source, tmp_path, monkeypatch, capsys):
    source, out = save_source(), tmp_path / "out"
    out.mkdir()
    if place == "current":
        monkeypatch.chdir(out)
    elif place == "mount":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    else:
        monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr("mha2mla.conversion.run.open_checkpoint", None)  # no work is begun
    assert run(source, "." if place == "current" else out, *FULL, "--kv-lora-rank", 24) == 2
    told = capsys.readouterr().err
    assert "so that a complete output cannot take its place. Give a folder in it" in told and "model." in told


@pytest.mark.parametrize("made", [False, True])
def test_a_link_is_followed_to_its_disk(made, save_source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/model")
    if made:
        (tmp_path / "disk" / "model").mkdir()
    assert run(save_source(), tmp_path / "out", *FULL, "--kv-lora-rank", 24) == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "model" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_dies_leaves_no_half_model(killed, save_source, tmp_path, caplog):
    """Once by an error while weights are written, once by SIGKILL."""
    source, out = save_source(), tmp_path / "out"
    arguments = ["convert", str(source), str(out), *FULL, "--kv-lora-rank", "24", "--preset", "paper"]
    program = (
        "import sys, time\n"
        "from mha2mla.conversion import checkpoint\n"
        "def stop(self):\n"
        "    print('writing', flush=True)\n"
        f"    {'time.sleep(60)' if killed else 'raise OSError(28, str())'}\n"
        "checkpoint.CheckpointWriter.finish = stop\n"
        "from mha2mla.cli.main import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.stdout.readline().strip() != b"writing":
        assert process.poll() is None
        time.sleep(0.01)
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() != 0
    assert not out.exists()
    left = [path for path in tmp_path.glob(".out.partial-*") if path.is_dir()]
    assert len(left) == killed
    with caplog.at_level("INFO", logger="mha2mla"):
        assert run(source, out, *FULL, "--kv-lora-rank", 24) == 0
    assert not list(tmp_path.glob(".out.*"))
    assert all(f"Removing {folder}, which a run that was killed left behind" in caplog.text for folder in left)


BAD_OPTIONS = {
    "or both --kv-lora-rank and --qk-rope-head-dim": (["--rope-selection", "high"], "gqa"),
    "cache_ratio=1.5 must lie between 0 and 1. For 31.25 %, give 0.3125.": (["--cache-ratio", "1.5"], "gqa"),
    "cache_ratio=25.0 must lie between 0 and 1. For 25 %, give 0.25.": (["--cache-ratio", "25"], "gqa"),
    "cache_ratio=0.0 must lie": (["--cache-ratio", "0"], "gqa"),
    "cache_ratio=-0.3 must lie": (["--cache-ratio", "-0.3"], "gqa"),
    "cache_ratio=nan must lie": (["--cache-ratio", "nan"], "gqa"),
    "not both": (["--cache-ratio", "0.5", "--kv-lora-rank", "8", "--rope-selection", "high"], "gqa"),
    "Use a ratio above": (["--cache-ratio", "0.05", "--rope-selection", "high"], "gqa"),
    "kv_lora_rank=400 must lie between 1 and 40": (
        ["--kv-lora-rank", "400", "--qk-rope-head-dim", "4", "--rope-selection", "high"],
        "gqa",
    ),
    "must be even and between 2 and the source's rotary dims of a head, 12": (
        ["--kv-lora-rank", "8", "--qk-rope-head-dim", "14", "--rope-selection", "high"],
        "gqa",
    ),
    "give --data": (["--cache-ratio", "0.5"], "gqa"),
    "There is no file nowhere.jsonl": (["--cache-ratio", "0.5", "--data", "nowhere.jsonl"], "gqa"),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_say_what_to_do(message, save_source, tmp_path, capsys):
    options, kind = BAD_OPTIONS[message]
    assert run(save_source(kind), tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


BAD_SOURCES = {
    "model_type": ({"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
    "moe": ({"num_local_experts": 8}, "mixture-of-experts"),
    "latent": ({"model_type": "deepseek_v3"}, "kv_lora_rank=512: the model has latent attention already"),
    "images": (
        {"model_type": "mistral3", "text_config": {"model_type": "mistral"}},
        "text_config: it is a model of more",
    ),
    "softcap": ({"model_type": "gemma2"}, "attn_logit_softcapping=50.0: its scores are capped"),
    "windows": ({"model_type": "gemma3_text", "rope_parameters": None}, "sliding_window=4096: most of its layers"),
    "sinks": ({"model_type": "gpt_oss"}, "each head has an attention sink"),
    "hybrid": ({"model_type": "qwen3_next", "head_dim": 16}, "layer_types has 'linear_attention'"),
    "other experts": ({"model_type": "qwen2_moe"}, "num_experts=60: its experts are of another kind"),
    "growing": (
        {"model_type": "ministral3", "rope_parameters": None, "max_position_embeddings": 32768},
        "llama_4_scaling_beta=0.1 makes queries larger from position 16384 on",
    ),
    "growing by nothing": (
        {"model_type": "ministral3", "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        "rope_parameters has no llama_4_scaling_beta, without which transformers' Ministral 3 does not run",
    ),
    "sliding": ({"model_type": "mistral", "sliding_window": 16}, "set sliding_window to null"),
    "some sliding": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "sliding_window=16: a window bounds",
    ),
    "sliding without RoPE": (
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 16, "no_rope_layer_interval": 2},
        "sliding_window=16: a window bounds",
    ),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "De-quantise"),
    "converted": ({"model_type": "mla_llama"}, "converted already"),
    "partial": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_unsupported_sources_name_field_and_remedy(case, save_source, tmp_path, capsys):
    change, message = BAD_SOURCES[case]
    source = save_source()
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    assert run(source, tmp_path / "out", "--cache-ratio", "0.5", "--rope-selection", "high") == 2
    assert message in capsys.readouterr().err


def test_pickled_missing_and_incomplete_weights(save_source, tmp_path, capsys):
    source = save_source()
    weights = source / "model.safetensors"
    options = (tmp_path / "out", *FULL, "--kv-lora-rank", 24)
    weights.rename(source / "pytorch_model.bin")
    assert run(source, *options) == 2
    assert "safetensors first: AutoModelForCausalLM" in (told := capsys.readouterr().err) and "AutoTokenizer" in told
    (source / "pytorch_model.bin").unlink()
    assert run(source, *options) == 2
    assert "No model.safetensors" in capsys.readouterr().err
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert run(source, *options) == 2
    assert "model-00001-of-00002.safetensors, which is not there" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", *options) == 2
    assert "There is no folder or .gguf file" in capsys.readouterr().err


def test_calibration_errors(save_source, calibration_file, tmp_path, capsys):
    source = save_source()
    base = (source, tmp_path / "out", "--cache-ratio", "0.5", "--data", calibration_file, "--length", 32)
    assert run(*base, "--column", "body") == 2
    assert "no column 'body'; it has text" in capsys.readouterr().err
    assert run(*base, "--samples", "1000") == 2
    assert "1000 are asked for" in capsys.readouterr().err


def test_command_without_arguments_lists_sub_commands(capsys):
    assert main([]) == 2
    assert "convert" in capsys.readouterr().err  # what was asked for is no command
    assert main(["--help"]) == 0


CALIBRATED = ("--samples", 6, "--length", 16, "--score-samples", 3, "--refine-steps", 3)


# transformers reads any tokenizer beside a Qwen2 as a byte-level one, which the pico tokenizer is not.
@pytest.mark.parametrize("kind", [k for k in SOURCES if k not in ("head-dim", "qwen2")])
def test_calibrated_is_the_default_and_splits_the_budget_itself(kind, save_source, calibration_file, tmp_path, caplog):
    source, out = save_source(kind), tmp_path / "out"
    with caplog.at_level("INFO", logger="mha2mla"):
        arguments = [source, out, "--cache-ratio", 0.3125, "--data", calibration_file, *CALIBRATED]
        assert main(["convert", *map(str, arguments)]) == 0
    record = json.loads((out / "conversion.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    config = model.config
    assert config.num_rope_key_heads == 1
    assert config.latent_cache_dim == record["cache_width"] == round(0.3125 * record["source_cache_width"])
    # Every candidate's loss was measured, and the lowest was taken, or a plain list that is as good.
    losses = {r.args[0]: r.args[1] for r in caplog.records if "loss" in r.msg}
    chosen = next(r.args[0] for r in caplog.records if "Chosen" in r.msg)
    assert chosen.qk_rope_head_dim == config.qk_rope_head_dim
    if losses:
        assert losses[chosen] <= min(losses.values()) + (TIE if chosen.is_plain else 0)
    # All layers rotate with what was chosen, each frequency once.
    for layer in model.model.layers:
        assert layer.self_attn.rope_frequencies.tolist() == [list(chosen.frequencies)]
    assert len(set(chosen.frequencies)) == config.qk_rope_head_dim // 2
    for layer in record["layers"]:
        assert 0 <= layer["unrotation_error"] and 0 < layer["key_energy_kept"] <= 1.0001
        assert layer["output_error"] > 0
    assert model.generate(tokens(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)
    assert "needs recovery training" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "choice, heads",
    [
        (("--rope-frequencies", "common"), 1),
        (("--rope-frequencies", "per-layer"), 1),
        (("--rope-layout", "per-head"), 2),
    ],
)
def test_explicit_sizes_overrule_the_search(choice, heads, save_source, calibration_file, tmp_path, caplog):
    source, out = save_source("gqa"), tmp_path / "out"
    sizes = ("--qk-rope-head-dim", 6, "--kv-lora-rank", 12, *choice)
    with caplog.at_level("INFO", logger="mha2mla"):
        run(source, out, *sizes, "--data", calibration_file, *CALIBRATED, preset="calibrated")
    # Only what all layers share is still to be found.
    assert ("loss" in caplog.text) == ("common" in choice)
    config = AutoConfig.from_pretrained(out)
    assert (config.qk_rope_head_dim, config.kv_lora_rank, config.num_rope_key_heads) == (6, 12, heads)


@pytest.mark.parametrize("steps", [0, 3])  # which have nothing to mend
def test_exact_sizes_lose_nothing_through_the_whole_pipeline(steps, save_source, calibration_file, tmp_path):
    source, out = save_source("gqa"), tmp_path / "out"
    sizes = ("--qk-rope-head-dim", 24, "--kv-lora-rank", 24, "--data", calibration_file)
    everything = ("--refine-steps", steps, "--rope-frequencies", "per-layer")
    run(source, out, *sizes, *CALIBRATED, *everything, preset="calibrated")
    expected = logits(source)
    assert (logits(out) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "zero",
    [("q_proj",), ("k_proj",), ("v_proj",), ("o_proj",), ("k_proj", "v_proj"), ("input_layernorm",)],
    ids="+".join,
)
@pytest.mark.parametrize("kind", ["gqa", "qwen3", "olmo2"])
def test_layers_that_were_pruned_are_zero_still(kind, zero, save_source, calibration_file, tmp_path):
    source, out = save_source(kind), tmp_path / "out"
    stored = load_file(source / "model.safetensors")
    pruned = {n: t * 0 if "layers.1." in n and any(part in n for part in zero) else t for n, t in stored.items()}
    save_file(pruned, source / "model.safetensors", metadata={"format": "pt"})
    config = SOURCES[kind]
    width = config.num_key_value_heads * head_dim(config)
    text = ("--data", calibration_file, *CALIBRATED[:4])
    sizes = ("--qk-rope-head-dim", width, "--kv-lora-rank", min(width, config.hidden_size))
    everything = ("--refine-steps", 0, "--rope-frequencies", "per-layer")
    assert run(source, out, *sizes, *text, *everything, preset="calibrated") == 0
    expected = logits(source)
    assert (logits(out) - expected).abs().max() <= 1e-4 * expected.abs().max()
    for preset, own in (("calibrated", CALIBRATED[4:]), ("paper", ())):
        options = ("--cache-ratio", 0.5, *text, *own, "--overwrite")
        assert run(source, out, *options, preset=preset) == 0
        assert logits(out).isfinite().all() and "NaN" not in (out / "conversion.json").read_text()


def test_common_frequencies_are_each_there_once(save_source, calibration_file, tmp_path, capsys):
    sizes = ("--qk-rope-head-dim", 14, "--kv-lora-rank", 12, "--data", calibration_file)
    assert run(save_source("gqa"), tmp_path / "out", *sizes, *CALIBRATED, preset="calibrated") == 2
    assert "6 frequencies" in (message := capsys.readouterr().err) and "--rope-frequencies per-layer" in message


def test_calibration_state_serves_several_ratios_and_refuses_other_text(
    save_source, calibration_file, tmp_path, monkeypatch, capsys
):
    from mha2mla.conversion.presets.calibrated import passes as calibrated

    source, state = save_source("gqa"), tmp_path / "state"
    base = ("--data", calibration_file, "--calibration-state", state, *CALIBRATED)
    run(source, tmp_path / "fresh", "--cache-ratio", 0.3, *base, preset="calibrated")
    assert sorted(p.name for p in state.iterdir() if p.name != ".lock") == [
        "calibration.json",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
    ]

    def fail(*args):
        raise AssertionError("the statistics were collected again")

    with monkeypatch.context() as patched:
        patched.setattr(calibrated, "collect_statistics", fail)
        run(source, tmp_path / "other", "--cache-ratio", 0.5, *base, preset="calibrated")
        run(source, tmp_path / "same", "--cache-ratio", 0.3, *base, preset="calibrated")
    torch.testing.assert_close(logits(tmp_path / "same"), logits(tmp_path / "fresh"))
    assert run(source, tmp_path / "x", "--cache-ratio", 0.5, *base, "--seed", 7, preset="calibrated") == 2
    assert "made with other values of: text. Give" in capsys.readouterr().err
    (state / "calibration.json").unlink()
    assert run(source, tmp_path / "x", "--cache-ratio", 0.5, *base, preset="calibrated") == 2
    assert "not a calibration state" in capsys.readouterr().err


def test_calibration_state_belongs_to_the_weights_wherever_they_lie(
    save_source, calibration_file, tmp_path, monkeypatch, capsys
):
    """A .gguf is unpacked to another folder each time; a later checkpoint may take an earlier one's place."""
    source, moved = save_source("gqa"), tmp_path / "moved"
    base = ("--data", calibration_file, "--calibration-state", tmp_path / "state", "--cache-ratio", 0.3, *CALIBRATED)
    assert run(source, tmp_path / "out", *base, preset="calibrated") == 0
    source.rename(moved)
    monkeypatch.chdir(tmp_path)
    assert run("moved", tmp_path / "again", *base, preset="calibrated") == 0
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][-1, -1] *= 1.01  # trained on
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert run(moved, tmp_path / "trained", *base, preset="calibrated") == 2
    assert "made with other values of: weights. Give the model" in capsys.readouterr().err


def test_text_with_tokens_that_the_model_has_not_is_refused(save_source, calibration_file, tmp_path, capsys):
    source = save_source("gqa")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<new {i}>" for i in range(200)])
    tokenizer.save_pretrained(source)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "w5 w6 <new 150> " * 200}) + "\n")
    assert run(source, tmp_path / "out", "--data", text, *CALIBRATED, "--cache-ratio", 0.3, preset="calibrated") == 2
    assert "resize_token_embeddings" in (message := capsys.readouterr().err) and "vocab_size=" in message
    options = ("--data", calibration_file, *CALIBRATED, "--cache-ratio", 0.3)
    assert run(source, tmp_path / "out", *options, preset="calibrated") == 0


def test_blocks_longer_than_the_context_are_refused(save_source, calibration_file, tmp_path, capsys):
    options = ("--data", calibration_file, "--cache-ratio", 0.3, "--samples", 2, "--length", 64)
    assert run(save_source("gqa"), tmp_path / "out", *options, preset="calibrated") == 2
    assert "length=64 is more than the source's context: give --length 32." in capsys.readouterr().err


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ConversionConfig(cache_ratio="0.5", data="t"), "cache_ratio='0.5' must be of type float, got str"),
        (lambda: ConversionConfig(cache_ratio=0.5, data=["t"]), r"data=\['t'\] must be of type str, got list"),
        (lambda: ConversionConfig(cache_ratio=0.5, data="t", samples=True), "samples=True must be of type int, got b"),
        (lambda: Paper(rope_selection=3), "rope_selection=3 must be of type str, got int"),
        (lambda: ExportConfig(pad="512"), "pad='512' must be of type int, got str"),
    ],
)
def test_options_of_another_type_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_source_and_output_may_be_paths(save_source, tmp_path):
    config = ConversionConfig(preset=Paper(svd="none", rope_selection="uniform"), qk_rope_head_dim=4)
    assert convert(Path(save_source("gqa")), tmp_path / "out", config) == tmp_path / "out"


def test_values_of_torch_and_numpy_and_paths_become_plain_ones():
    assert ConversionConfig(kv_lora_rank=24, qk_rope_head_dim=8, data="t", device="cpu:0").length == 1024
    config = ConversionConfig(
        kv_lora_rank=np.int64(24),
        qk_rope_head_dim=8,
        data=Path("t.jsonl"),
        device=torch.device("cuda", 1),
        dtype=torch.bfloat16,
        overwrite=np.bool_(True),
        preset=Calibrated(refine_learning_rate=np.float32(0.5)),
    )
    assert config == ConversionConfig(
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        data="t.jsonl",
        device="cuda:1",
        dtype="bfloat16",
        overwrite=True,
        preset=Calibrated(refine_learning_rate=0.5),
    )
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert ExportConfig(dtype=torch.float32).dtype == "float32"


OTHER_PRESETS = {
    "svd is an option of the preset 'paper', and 'calibrated' is chosen. Leave it out, or add --preset paper": (
        "calibrated",
        ("--svd", "split"),
    ),
    "refine_steps is an option of the preset 'calibrated', and 'paper' is chosen": ("paper", ("--refine-steps", 0)),
}


@pytest.mark.parametrize("message", OTHER_PRESETS)
def test_options_of_another_preset_are_refused(message, save_source, tmp_path, capsys):
    preset, options = OTHER_PRESETS[message]
    assert run(save_source(), tmp_path / "out", "--cache-ratio", 0.5, *options, preset=preset) == 2
    assert message in capsys.readouterr().err


def test_help_shows_the_options_of_every_preset(capsys):
    with pytest.raises(SystemExit) as end:
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for preset, option in (("calibrated", "--refine-steps"), ("paper", "--svd")):
        assert option in shown.split(f"\npreset {preset}", 1)[1].split("\npreset", 1)[0]


def test_no_low_rank_needs_no_size():
    """Heads of 12 dims: an eighth is less than one pair."""
    plan = Paper(svd="none", rope_selection="uniform").plan(architecture_of(make_source("gqa").config), CacheSizes())
    assert (plan.qk_rope_head_dim, plan.kv_lora_rank) == (2, 2 * 10 + 2 * 12)


def test_options_of_a_preset_are_its_own():
    config = ConversionConfig(preset=Paper(svd="split", rope_selection="high"), cache_ratio=0.25)
    assert config.to_dict().items() >= {"preset": "paper", "svd": "split", "cache_ratio": 0.25}.items()
    assert "refine_steps" not in config.to_dict()
    assert ConversionConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"preset='paper' must be an object .* Paper\(\)"):
        ConversionConfig(preset="paper", cache_ratio=0.25)
    with pytest.raises(ValueError, match="preset='best' must be one of calibrated, paper"):
        ConversionConfig.from_dict({"preset": "best"})
    with pytest.raises(ValueError, match="no option 'svg'"):
        ConversionConfig.from_dict({"preset": "paper", "svg": "split"})


def test_an_option_of_a_preset_is_told_where_it_goes():
    sizes = dict(cache_ratio=0.25, data="x.jsonl")
    message = (
        r"refine_steps=24 is an option .* 'calibrated': give preset=Calibrated\(refine_steps=24, score_samples=2\)"
    )
    with pytest.raises(ValueError, match=message):
        ConversionConfig(refine_steps=24, score_samples=2, **sizes)
    with pytest.raises(ValueError, match=r"svd='split' is an option .* give preset=Paper\(svd='split'\)"):
        ConversionConfig(svd="split", **sizes)
    with pytest.raises(TypeError, match="unexpected keyword argument 'refine_step'"):
        ConversionConfig(refine_step=24, **sizes)
    assert "cache_ratio" in inspect.signature(ConversionConfig).parameters  # for help()


def test_calibrated_needs_text(save_source, tmp_path, capsys):
    assert run(save_source(), tmp_path / "out", "--cache-ratio", 0.5, preset="calibrated") == 2
    assert "give --data" in capsys.readouterr().err


def test_it_ends_with_what_it_did_and_what_comes_next(save_source, calibration_file, tmp_path, caplog):
    source, out = save_source("gqa"), tmp_path / "a model"
    options = ("--cache-ratio", 0.3, "--data", calibration_file, "--column", "text", *CALIBRATED)
    with caplog.at_level("INFO", logger="mha2mla"):
        assert main(["convert", *map(str, (source, out, *options))]) == 0
    cache, loss, engines, recovery, wrote, following, *commands = caplog.records[-1].getMessage().splitlines()
    assert cache.startswith("Cache: 48 -> 14 values") and engines.startswith("Engines for an export: transformers")
    assert (
        recovery.startswith("Recovery: ")
        and f"at 31.25 % of its cache (the nearest size measured), was {LOST[31.25]}" in recovery
    )
    assert (wrote, following) == (f"Wrote {out}", "Next:")
    assert [shlex.split(command)[:2] for command in commands] == [
        ["mha2mla", "chat"],
        ["mha2mla", "train"],
        ["mha2mla", "export"],  # for no engine with kernels, as padding would make the cache larger than the source's
    ]
    # The losses are those of the models themselves, on text behind the calibration's.
    text = load_blocks(source, str(calibration_file), 6, 16, seed=0, num_more=8)
    held_out = text[6:]
    assert 0 < len(held_out) <= 8
    for folder, value in zip((source, out), re.findall(r"\d\.\d{3}(?= |$)", loss), strict=True):
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder)(held_out, labels=held_out).loss
        assert abs(float(value) - expected.item()) < 2e-3
    # The commands run as they stand.
    train, export = (shlex.split(command)[1:] for command in commands[1:])
    short = ["--length", "16", "--max-steps", "1", "--report_to", "none", "--use_cpu"]
    assert main([*train, *short]) == 0 and (tmp_path / "a model-recovered" / "config.json").is_file()
    assert main(export) == 0 and (tmp_path / "a model-served" / "config.json").is_file()


def test_a_loss_beyond_any_perplexity_is_told(save_source, calibration_file, tmp_path, caplog):
    """A head like this makes losses of thousands of nats; the output is there, and the end of the command too."""
    source = save_source("gqa")
    stored = load_file(source / "model.safetensors")
    save_file({**stored, "lm_head.weight": 1e4 * stored["lm_head.weight"]}, source / "model.safetensors")
    with caplog.at_level("INFO", logger="mha2mla"):
        sizes = ("--cache-ratio", 0.5, "--data", calibration_file, *CALIBRATED)
        assert run(source, tmp_path / "out", *sizes, preset="calibrated") == 0
    assert "(perplexity inf -> inf)" in caplog.text


def test_without_more_text_no_loss_is_told(save_source, calibration_file, tmp_path, caplog):
    options = ("--cache-ratio", 0.3, "--data", calibration_file, "--samples", 63, "--length", 16, "--refine-steps", 0)
    with caplog.at_level("INFO", logger="mha2mla"):
        assert main(["convert", *map(str, (save_source("gqa"), tmp_path / "out", *options))]) == 0
    assert "Loss: " not in caplog.text
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["held_out_loss"] == {}
