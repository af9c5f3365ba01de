"""`mha2mla plan`: what a cache would cost and bring, from the config alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, MistralConfig

from mha2mla.cli.main import main
from mha2mla.cli.plan import GPU_MEMORY, QUALITY, advised
from mha2mla.conversion.architectures import architecture_of
from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.export import ExportConfig, export
from mha2mla.conversion.presets.calibrated import Calibrated
from mha2mla.conversion.recovered import LOST_BELOW, POINTS_LOST, SMALL, TOKENS
from mha2mla.conversion.survey import survey_caches
from pico import ARCHITECTURE_FIELDS, BASE, SOURCES, make_mla

LLAMA3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)


def test_tokens_are_what_vllm_had_room_for():
    survey = survey_caches(LLAMA3_8B)
    found = {offer.title: offer for offer in (survey.original, *survey.offers)}
    assert survey.original.num_parameters == 8_030_261_248
    measured = {  # docs/serving.md: vLLM 0.25.1, one H100
        ("original", 2): 457_840,
        ("original", 1): 915_984,
        ("512 + 64", 2): 1_594_560,
        ("512 + 64", 1): 3_211_520,
        ("256 + 64", 2): 2_892_976,
    }
    for (title, size), tokens in measured.items():
        assert found[title].tokens_in(GPU_MEMORY["h100"] * 2**20, size) == pytest.approx(tokens, rel=0.035)
    assert found["512 + 64"].bytes_per_token(1) == 576 * 32
    assert found["512 + 64"].engines == "transformers, vLLM on a GPU, vLLM on a CPU, SGLang, llama.cpp"
    assert found["31.25 %"].sizes == "592 + 48"
    assert found["31.25 %"].engines == "transformers, llama.cpp"
    assert survey.original.tokens_in(2**30, 1) == 0  # the weights alone are more


@pytest.mark.parametrize("kind, form", [("llama", "shared"), ("mixtral", "mla_mixtral")])
def test_weights_are_those_of_the_export_that_kernels_take(kind, form, tmp_path):
    """Heads of 64 are padded to 128, those of values are not shared, and the head is not tied."""
    fields = dict(hidden_size=320, head_dim=64, num_key_value_heads=4, tie_word_embeddings=True)
    config = AutoConfig.for_model(kind, **{**BASE, **fields, **ARCHITECTURE_FIELDS.get(kind, {})})
    (offer,) = (offer for offer in survey_caches(config).offers if offer.title == "256 + 64")
    model = make_mla(form, **fields, v_head_dim=64, kv_lora_rank=256, qk_rope_head_dim=64)
    for layer in model.model.layers:
        layer.self_attn.rope_frequencies.copy_(torch.arange(32)[None])
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", ExportConfig(pad=256))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert offer.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert survey_caches(config).original.num_parameters < offer.num_parameters


@pytest.mark.parametrize("kind", SOURCES)
def test_every_architecture_has_a_plan(kind):
    survey = survey_caches(SOURCES[kind])
    width = survey.original.width
    assert [round(width * ratio) for ratio in (0.3125, 0.1875)] == [o.width for o in survey.offers][:2]
    assert set(survey.refused) >= {"512 + 64", "256 + 64"}
    config = SOURCES[kind]
    biased = config.model_type in ("qwen2", "seed_oss") or getattr(config, "attention_bias", False)
    foreign = biased or config.model_type.startswith(("qwen3", "olmo2", "arcee"))
    assert all(offer.engines.startswith("none. ") == foreign for offer in survey.offers)


@pytest.mark.parametrize("value", [0, -8])
@pytest.mark.parametrize("field", ["num_hidden_layers", "intermediate_size", "max_position_embeddings", "head_dim"])
def test_a_size_of_nothing_is_named(field, value, save_source, capsys):
    source = save_source("gqa")
    config = json.loads((source / "config.json").read_text()) | {field: value}
    (source / "config.json").write_text(json.dumps(config))
    paper = ["--preset", "paper", "--rope-selection", "high", "--cache-ratio", "0.5"]
    for command in (["plan", str(source)], ["convert", str(source), str(source.parent / "out"), *paper]):
        assert main(command) == 2
        assert f"{field}={value} must be at least 1. Mend config.json." in capsys.readouterr().err


def test_options_ask_for_the_offer():
    survey = survey_caches(LLAMA3_8B)
    assert [offer.options for offer in survey.offers[2:4]] == [
        ("--cache-ratio", "0.125"),
        ("--kv-lora-rank", "512", "--qk-rope-head-dim", "64"),
    ]
    assert {"cache_ratio", "kv_lora_rank", "qk_rope_head_dim"} == set(vars(CacheSizes()))


@pytest.mark.parametrize(
    "heads, options",
    [
        (8, ("--serve", "vllm")),
        # 512 + 64 would be 56 % of 1,024 values
        (4, ("--kv-lora-rank", "256", "--qk-rope-head-dim", "64", "--serve", "vllm")),
        (2, ("--cache-ratio", "0.3125")),
    ],
)
def test_what_vllm_serves_is_advised_where_it_halves_the_cache(heads, options):
    config = LlamaConfig(**{**LLAMA3_8B.to_dict(), "num_key_value_heads": heads})
    assert advised(survey_caches(config)) == options


def test_table_of_a_folder_without_weights(tmp_path, capsys):
    LLAMA3_8B.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--gpu", "L40S"]) == 0
    printed = capsys.readouterr().out
    assert "| 512 + 64 |" in printed and "tokens in L40S bf16" in printed and "131,072" in printed
    assert f"Next: mha2mla convert {tmp_path} CONVERTED --serve vllm --data TEXT" in printed
    assert main(["plan", str(tmp_path), "--memory", "12"]) == 0
    small = capsys.readouterr().out
    assert "tokens in 12 GiB bf16" in small and "Where it says 0, the weights do not fit" in small
    assert "do not fit" not in printed


@pytest.mark.parametrize(
    "dtype, served", [(None, "bf16"), ("bfloat16", "bf16"), ("float32", "bf16"), ("float16", "fp16")]
)
def test_bytes_are_those_of_the_type_that_it_is_served_in(dtype, served, save_source, tmp_path, capsys, caplog):
    """Plan and conversion count alike, whatever the weights are stored in."""
    source = save_source("gqa", dtype=getattr(torch, dtype or "float32"))
    if dtype is None:
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (source / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(source)]) == 0
    printed = capsys.readouterr().out
    assert f"bytes/token {served} |" in printed and f"weights in {served} (" in printed
    assert {"192", "60"} <= set(re.findall(r"\d+", printed))  # 2 layers, 48 and 15 values, 2 bytes
    with caplog.at_level("INFO", logger="mha2mla"):
        sizes = ["--cache-ratio", "0.3125", "--preset", "paper", "--rope-selection", "high"]
        assert main(["convert", str(source), str(tmp_path / "out"), *sizes]) == 0
    assert caplog.text.count(f"192 -> 60 bytes per token in {served} (") == 2


def test_a_ratio_has_a_rotary_key_of_sane_size():
    """Three eighths of a head's dims, and at most a third of the cache."""
    assert [o.sizes for o in survey_caches(LLAMA3_8B).offers[:3]] == ["592 + 48", "336 + 48", "208 + 48"]
    small = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    assert [o.sizes for o in survey_caches(small).offers[:3]] == ["96 + 24", "48 + 24", "32 + 16"]
    whole = architecture_of(LlamaConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=2))
    plan = Calibrated().plan(whole, CacheSizes(cache_ratio=0.515))
    assert (plan.kv_lora_rank, plan.qk_rope_head_dim) == (4095, 124)  # no latent holds more than the hidden state


def test_mistakes(tmp_path, capsys):
    MistralConfig(sliding_window=1024).save_pretrained(tmp_path / "window")
    for argv, message in (
        ([str(tmp_path / "window")], "sliding_window=1024"),
        ([str(tmp_path / "nothing")], "there is no folder"),
        ([str(tmp_path / "window"), "--gpu", "h100", "--memory", "3"], "Give --gpu or --memory, not both"),
        ([str(tmp_path / "window"), "--memory", "0"], "memory=0 must be a number of GiB above 0"),
        ([str(tmp_path / "window"), "--memory", "inf"], "memory=inf must be a number of GiB above 0"),
    ):
        assert main(["plan", *argv]) == 2
        assert message in capsys.readouterr().err


def test_a_cache_smaller_than_any_measured_is_named(tmp_path, capsys):
    LLAMA3_8B.save_pretrained(tmp_path / "grouped")
    LlamaConfig(hidden_size=2048, num_hidden_layers=2, num_attention_heads=32).save_pretrained(tmp_path / "whole")
    printed = []
    for name in ("grouped", "whole"):
        assert main(["plan", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    assert SMALL not in printed[0]
    assert f"\n\n256 + 64: {SMALL}.\n\n" in printed[1]  # 7.8 %; 12.5 % and 512 + 64, 14 %, are not


def test_quality_is_as_measured():
    """What is known of recovery is the table of docs/recovery.md; what is told of it stands in the results."""
    docs = Path(__file__).parents[1] / "docs"
    before = (docs / "conversion.md").read_text(encoding="utf-8")
    page, results = ((docs / name).read_text(encoding="utf-8") for name in ("recovery.md", "dev/results.md"))
    assert f"{TOKENS}M tokens" in page and f"after {TOKENS}M tokens" in results
    size, points, error = LOST_BELOW
    assert f"| -{100 - size:g} % | 55M | {points:.2f} ± {error:.2f} |" in results
    for size, (points, error) in POINTS_LOST.items():
        lost = f"{points:.2f} ± {error:.2f}"
        row = next(line for line in page.splitlines() if line.startswith(f"| {size:g} % |"))  # as the recipe of today
        assert f"| {lost} |" in row
        assert lost in QUALITY and lost in results and f"| {lost} |" in before
