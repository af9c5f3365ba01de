"""What conversion knows of the engines that are to run its exports: sizes, rotary tables, refusals before the work."""

import re

import pytest
import torch
from conftest import pico_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mha2mla.cli.main import main
from mha2mla.common.kernel_sizes import ENGINES
from mha2mla.conversion.cache_sizes import CacheSizes
from mha2mla.conversion.export import export
from mha2mla.conversion.export.engines import advise_sizes, engines_for_frequencies, kernel_sizes
from mha2mla.modeling import MLALlamaConfig
from pico import BASE, ROPES, make_source

QUICK = ("--samples", 4, "--length", 16, "--score-samples", 2, "--refine-steps", 0)
SMALL = ("--kv-lora-rank", 12, "--qk-rope-head-dim", 6)


def convert(source, out, *options) -> int:
    return main(["convert", *map(str, (source, out, *QUICK, *options))])


@pytest.mark.parametrize(
    "engine, source_width, expected",
    [
        ("vllm", 2048, (512, 64)),  # Llama-3-8B
        ("vllm", 577, (512, 64)),
        ("vllm", 512, (256, 64)),
        ("sglang", 8192, (512, 64)),  # Llama-2-7B
    ],
)
def test_sizes_not_given_are_those_of_kernels(engine, source_width, expected):
    sizes = kernel_sizes(CacheSizes(), ENGINES[engine], source_width)
    assert (sizes.kv_lora_rank, sizes.qk_rope_head_dim) == expected


@pytest.mark.parametrize(
    "engine, sizes, source_width, message",
    [
        ("vllm", CacheSizes(), 320, "320 values per token and layer, less than vLLM on a GPU takes .512 . 64 or 256"),
        ("sglang", CacheSizes(), 512, r"512 values.* --pad"),
        ("vllm", CacheSizes(cache_ratio=0.3), 2048, r"cache_ratio=0.3 leaves the split open.*512 \+ 64 or 256 \+ 64"),
        (
            "vllm",
            CacheSizes(kv_lora_rank=513, qk_rope_head_dim=64),
            2048,
            "kv_lora_rank=513 is more.*Give 512",
        ),
        ("vllm", CacheSizes(kv_lora_rank=512, qk_rope_head_dim=66), 2048, "qk_rope_head_dim=66 is more.*Give 64"),
    ],
)
def test_sizes_without_kernels_are_refused(engine, sizes, source_width, message):
    with pytest.raises(ValueError, match=message):
        kernel_sizes(sizes, ENGINES[engine], source_width)


def test_engines_of_any_size_take_what_is_asked_for():
    for name in ("transformers", "llama.cpp"):
        for sizes in (CacheSizes(cache_ratio=0.3), CacheSizes(kv_lora_rank=7, qk_rope_head_dim=4)):
            assert kernel_sizes(sizes, ENGINES[name], 384) is sizes


def test_advice_names_what_is_smaller_than_the_source():
    assert advise_sizes(640, 2048) == (
        "vLLM's GPU kernels take 512 + 64 (28.1% of the cache) or 256 + 64 (15.6% of the cache), SGLang's 512 + 64: "
        "--serve vllm chooses among them"
    )
    assert advise_sizes(120, 384) == (
        "vLLM's GPU kernels take 256 + 64 (83.3% of the cache): --serve vllm chooses among them"
    )
    assert advise_sizes(576, 2048) is None  # one of them already
    assert advise_sizes(120, 320) is None  # nothing to gain


VLLM, CPU, SGLANG, ANY = "vLLM on a GPU", "vLLM on a CPU", "SGLang", ("transformers", "llama.cpp")


@pytest.mark.parametrize(
    "rank, rope, head_dim, frequencies, expected",
    [
        (512, 64, 128, range(32), {VLLM: None, CPU: None, SGLANG: None}),
        (256, 64, 128, range(32), {VLLM: None, CPU: 512, SGLANG: 512}),
        (80, 40, 64, range(20), {VLLM: 256, CPU: 512, SGLANG: 512}),
        (512, 64, 256, range(32), {}),
        (
            512,
            64,
            128,
            [*range(28), *range(41, 45)],
            {VLLM: None, CPU: None, SGLANG: None},
        ),
    ],
)
def test_engines_by_size(rank, rope, head_dim, frequencies, expected):
    config = MLALlamaConfig(
        head_dim=head_dim, kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=head_dim, v_head_dim=head_dim
    )
    padded = {
        name: f" (--pad {pad}: {pad + 64} values, {(pad + 64) / 1024:.0%} of the original's)" if pad else ""
        for name, pad in expected.items()
    }
    named = [ANY[0], *(name + padding for name, padding in padded.items()), ANY[1]]
    assert engines_for_frequencies(config, list(frequencies), 1024)[1] == ", ".join(named)


def test_a_model_that_no_engine_can_run_says_why():
    found, reason = engines_for_frequencies(MLALlamaConfig(attention_bias=True), [0, 1], 1024)
    assert found == [] and reason.startswith("none. attention_bias=True")
    assert engines_for_frequencies(MLALlamaConfig(), None, 1024) == (
        [],
        "none. Layers have rotary frequencies of their own.",
    )


@pytest.mark.parametrize("scaling", [{}, {"rope": "llama3", "original_max_position_embeddings": 512}])
def test_default_conversions_can_be_exported(scaling, calibration_file, tmp_path, caplog):
    """Only lists are chosen that a stock table has, also where the source's scaling has moved some frequencies."""
    source, out = tmp_path / "source", tmp_path / "out"
    make_source("gqa", **scaling).save_pretrained(source)
    pico_tokenizer().save_pretrained(source)
    with caplog.at_level("INFO", logger="mha2mla"):
        sizes = ("--kv-lora-rank", 12, "--qk-rope-head-dim", 8)
        assert convert(source, out, *sizes, "--data", calibration_file) == 0
    tried = [set(r.args[0].frequencies) for r in caplog.records if "loss" in r.msg]
    # Between 3, which llama3's scaling moves in part, and 4, which it moves wholly, is no step of a table.
    assert len(tried) > 1 and (not scaling or not any({3, 4} <= frequencies for frequencies in tried))
    export(out, tmp_path / "served")
    assert AutoConfig.from_pretrained(tmp_path / "served").model_type == "deepseek_v3"


def test_llama_cpp_gets_a_list_without_a_step(save_source, calibration_file, tmp_path, caplog):
    source, out = save_source("head-dim"), tmp_path / "out"
    with caplog.at_level("INFO", logger="mha2mla"):
        assert convert(source, out, *SMALL, "--data", calibration_file, "--serve", "llama.cpp") == 0
    assert "llama.cpp" in next(r.getMessage() for r in caplog.records if "Engines for an export" in r.msg)


def test_kernel_sizes_are_chosen_and_padded(save_source, calibration_file, tmp_path, caplog):
    source, out = save_source("gqa"), tmp_path / "out"
    with caplog.at_level("INFO", logger="mha2mla"):
        assert convert(source, out, *SMALL, "--data", calibration_file, "--serve", "vllm") == 0
    assert "vLLM on a GPU (--pad 256: 320 values, 667% of the original's)" in caplog.text
    main(["export", str(out), str(tmp_path / "served"), "--pad", "256"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype=torch.float32)
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim) == (256, 64)


@pytest.mark.parametrize(
    "kind, rope, options, message",
    [
        ("gqa", "default", ("--rope-frequencies", "per-layer"), "frequencies of their own .*Leave --rope-frequencies"),
        ("gqa", "default", ("--rope-layout", "per-head"), "num_rope_key_heads=2.*--rope-layout shared"),
        ("gqa", "default", ("--preset", "paper"), "num_rope_key_heads=2"),
        ("llama-bias", "default", (), "attention_bias=True: .* in transformers or .*Without --serve it is converted"),
        ("qwen3", "default", (), "qk-norm.*Without --serve it is converted"),
        ("gqa", "dynamic", (), "rope_type='dynamic'"),
        ("gqa", "linear", (), "no rotary table for 3 frequencies"),
    ],
)
def test_what_cannot_be_served_is_refused(
    kind, rope, options, message, save_source, calibration_file, tmp_path, monkeypatch, capsys
):
    from mha2mla.conversion.presets.calibrated.passes import Passes

    source, out = save_source(kind, rope=rope), tmp_path / "out"
    if rope != "linear":  # which lists there are is known once the text has been measured
        monkeypatch.setattr(Passes, "collect", None)
    sizes = SMALL if kind != "qwen3" else ("--kv-lora-rank", 12, "--qk-rope-head-dim", 8)
    quick = () if "paper" in options else QUICK
    arguments = [source, out, *sizes, *quick, "--data", calibration_file, "--serve", "vllm", *options]
    assert main(["convert", *map(str, arguments)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not out.exists()


@pytest.mark.parametrize(
    "changes, advised",
    [
        (dict(head_dim=64, num_key_value_heads=4, hidden_size=320), True),
        (dict(head_dim=64, num_key_value_heads=4, hidden_size=320, attention_bias=True), False),
        (dict(head_dim=16, num_attention_heads=12, num_key_value_heads=12, hidden_size=384), False),  # 8 frequencies
        (dict(head_dim=64, num_key_value_heads=4), False),  # matrices of rank 48
        (dict(head_dim=64, num_key_value_heads=4, hidden_size=320, rope_parameters=ROPES["linear"]), False),
    ],
)
def test_kernel_sizes_are_advised_where_they_work(changes, advised, calibration_file, tmp_path, caplog, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    AutoModelForCausalLM.from_config(LlamaConfig(**{**BASE, **changes})).save_pretrained(source)
    pico_tokenizer().save_pretrained(source)
    with caplog.at_level("INFO", logger="mha2mla"):
        assert convert(source, out, *SMALL, "--data", calibration_file) == 0
    assert ("--serve vllm chooses among them" in caplog.text) == advised
    assert convert(source, tmp_path / "served", "--data", calibration_file, "--serve", "vllm") == (0 if advised else 2)
    error = capsys.readouterr().err
    if not advised and not {"attention_bias", "rope_parameters"} & set(changes):
        assert "to fill 256 + 64, which vLLM on a GPU takes. Give smaller --kv-lora-rank" in error


def test_an_unknown_engine_is_refused(save_source, tmp_path, capsys):
    assert convert(save_source("gqa"), tmp_path / "out", *SMALL, "--data", "x.txt", "--serve", "tgi") == 2
    assert "vllm" in capsys.readouterr().err
