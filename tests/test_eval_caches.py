"""Evaluation over quantised caches, against loops written out here."""

import json

import pytest
import torch
from conftest import pico_tokenizer
from test_eval_command import arguments, models, sets  # noqa: F401 (fixtures)
from test_evaluation import random_texts
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from mha2mla.cli.main import main
from mha2mla.evaluation import caches
from mha2mla.evaluation.caches import DYNAMIC, CacheKind
from mha2mla.evaluation.measures.perplexity import measure_text_perplexity, text_tokens
from mha2mla.evaluation.measures.scoring import Request, score_requests
from mha2mla.evaluation.run import measure_cache
from mha2mla.modeling import CACHE_ARGUMENT, quantized_cache
from pico import BASE, make_mla, make_source, tokens

TOKENIZER = pico_tokenizer()
REQUESTS = [
    Request("a", tokens(1, 9, seed=1)[0].tolist(), [[5, 6, 7], [8]]),
    Request("b", tokens(1, 5, seed=2)[0].tolist(), [[9, 10], [11, 12, 13], [14]]),
]


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    """The pico models' context is no longer than the usual window."""
    monkeypatch.setattr(caches, "RESIDUAL_LENGTH", 4)
    monkeypatch.setattr(caches, "PIECE", 2)
    monkeypatch.setattr("mha2mla.modeling.latent_quantized_cache.MEAN_TOKENS", 4)


def test_names():
    assert CacheKind.parse("dynamic") == DYNAMIC
    assert CacheKind.parse("hqq-int2") == CacheKind("hqq-int2", 2, "hqq")
    assert CacheKind.parse("static-fp8") == CacheKind("static-fp8", 8, "fp8", "static")
    assert CacheKind.parse("static-compiled-int4").is_compiled and not CacheKind.parse("fp8").is_static
    source, mla = make_source().config, make_mla().config
    for name, of_source, of_mla in (("int8", "hqq", "latent"), ("int4", "quanto", "latent"), ("dynamic", None, None)):
        kind = CacheKind.parse(name)
        assert (kind.backend_for(source), kind.backend_for(mla)) == (of_source, of_mla)
    for name in ("int3", "int", "quanto", "hqq-fp8", "other-int4", "static-hqq-int4", "fp4"):
        with pytest.raises(ValueError, match="dynamic, static, static-compiled, int8, int4"):
            CacheKind.parse(name)


def test_vllm_fp8_suits_no_stock_mla():
    """vLLM rounds its latents; what transformers caches of it are keys and values."""
    assert not CacheKind.parse("vllm-fp8").suits(DeepseekV3Config())
    assert DYNAMIC.suits(DeepseekV3Config())


@pytest.mark.parametrize("name", ["source", "mla"])
@torch.no_grad()
def test_vllm_fp8_holds_what_e4m3_gives_back(name):
    model = {"source": make_source, "mla": make_mla}[name]()
    kind, ids = CacheKind.parse("vllm-fp8"), tokens(2, 12)
    assert kind.suits(model.config) and kind.can_select(model.config) and kind.piece(7) == 7
    plain, cache = DYNAMIC.make(model), kind.make(model)
    model(ids, **{CACHE_ARGUMENT: plain})
    whole = model(ids, **{CACHE_ARGUMENT: cache}).logits
    first, expected = (kept.layers[0].keys for kept in (cache, plain))  # what reaches the first layer is not rounded
    torch.testing.assert_close(first, expected.to(torch.float8_e4m3fn).to(expected.dtype), rtol=0, atol=0)
    again = kind.make(model)
    parts = [model(part, **{CACHE_ARGUMENT: again}).logits for part in ids.split([5, 6, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)  # steps read what a text does
    assert measure_cache(model, 5, kind) == measure_cache(model, 5) / 4  # fp32 here, a byte there
    written = model.generate(ids, max_new_tokens=4, do_sample=False, **kind.generate_arguments(model.config))
    for _ in range(4):
        ids = torch.cat((ids, model(ids, **{CACHE_ARGUMENT: kind.make(model)}).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, ids)


def test_what_a_model_can_hold(monkeypatch):
    source, mla = make_source().config, make_mla().config
    monkeypatch.setattr(caches, "is_installed", lambda module: False)
    assert CacheKind.parse("int4").suits(mla) and DYNAMIC.suits(source)
    assert not CacheKind.parse("int2").suits(mla) and not CacheKind.parse("latent-int4").suits(source)
    with pytest.raises(ValueError, match="pip install optimum-quanto"):
        CacheKind.parse("int4").suits(source)
    with pytest.raises(ValueError, match="pip install hqq"):
        CacheKind.parse("int8").suits(source)


@pytest.mark.parametrize("layout", ["per-head", "shared"])
def test_text_perplexity_reads_the_window_through_the_cache(layout):
    model, text = make_mla(layout), random_texts(20)
    ids = text_tokens(TOKENIZER, text[0])
    cache = quantized_cache(model, nbits=4, residual_length=4)
    with torch.no_grad():
        logits = [model(part[None], **{CACHE_ARGUMENT: cache}).logits[0] for part in ids[:-1].split(2)]
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), ids[1:]).item()
    loss = {name: measure_text_perplexity(model, TOKENIZER, text, 32, None, kind).loss for name, kind in KINDS.items()}
    assert loss["int4"] == pytest.approx(expected, abs=1e-5)
    assert loss["int8"] == pytest.approx(loss["dynamic"], rel=1e-2)
    assert loss["int4"] != pytest.approx(loss["dynamic"], abs=1e-4)


KINDS = {name: CacheKind.parse(name) for name in ("dynamic", "int8", "int4")}


def test_choices_find_their_context_in_the_quantised_cache():
    model = make_mla()
    plain, fine, coarse = (score_requests(model, REQUESTS, 2, "test", kind) for kind in KINDS.values())
    flat = [[score.log_likelihood for scored in rows for score in scored] for rows in (plain, fine, coarse)]
    assert flat[1] == pytest.approx(flat[0], abs=0.05)
    assert flat[2] != pytest.approx(flat[0], abs=1e-4)


def test_caches_that_cannot_select_read_the_context_for_each_continuation(monkeypatch):
    model = make_source()
    expected = score_requests(model, REQUESTS, 2, "test")
    monkeypatch.setattr(CacheKind, "can_select", lambda self, config: False)
    for rows, wanted in zip(score_requests(model, REQUESTS, 2, "test"), expected, strict=True):
        assert [r.log_likelihood for r in rows] == pytest.approx([w.log_likelihood for w in wanted], abs=1e-4)
        assert [r.greedy for r in rows] == [w.greedy for w in wanted]


def test_a_row_for_each_cache_a_model_can_have(models, sets, tmp_path, capsys, caplog):  # noqa: F811
    # In any order: what the others are compared with is measured first.
    command = arguments(models, sets, tmp_path, "--caches", "latent-int8,dynamic,latent-int4")
    assert main(command) == 0
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["models"]
    labels = [(row["name"], row["cache"]) for row in rows]
    assert labels == [("original", "dynamic"), ("half", "dynamic"), ("half", "latent-int8"), ("half", "latent-int4")]
    assert "latent-int8, latent-int4: of a converted model's text the first 128 tokens" in caplog.text
    sizes = [row["cache_bytes_per_token"] for row in rows[1:]]
    assert sizes[0] > sizes[1] > sizes[2]
    assert set(rows[3]["tasks"]) == set(rows[1]["tasks"])
    assert "half, latent-int4" in capsys.readouterr().out


def test_missing_backend_is_said_before_anything_is_measured(models, sets, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(caches, "is_installed", lambda module: False)
    assert main(arguments(models, sets, tmp_path, "--caches", "dynamic,int4")) == 2
    assert "pip install optimum-quanto" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_the_original_with_a_quantised_cache(backend):
    if not caches.is_installed(caches.BACKEND_MODULES[backend]):
        pytest.skip(f"{backend} is not installed")
    # Both want groups of 64 numbers.
    model = AutoModelForCausalLM.from_config(LlamaConfig(**BASE, num_key_value_heads=2, head_dim=32)).eval()
    kind = CacheKind.parse(f"{backend}-int4")
    plain = measure_text_perplexity(model, TOKENIZER, random_texts(20), 32)
    assert measure_text_perplexity(model, TOKENIZER, random_texts(20), 32, None, kind).loss == pytest.approx(
        plain.loss, rel=0.2
    )
    score_requests(model, REQUESTS, 2, "test", kind)
    # Codes, scales and zeros: less than 16 bits of the 32.
    assert measure_cache(model, 1, kind) < measure_cache(model, 1) / 2
