"""Evaluation over quantised caches, against loops written out here."""

import json
import re

import pytest
import torch
from conftest import pico_tokenizer
from test_eval_command import arguments, models, sets  # noqa: F401 (fixtures)
from test_evaluation import random_texts
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from mha2mla.cli.main import main
from mha2mla.evaluation import caches
from mha2mla.evaluation.caches import DYNAMIC, CacheKind
from mha2mla.evaluation.measures.generated import continue_greedily
from mha2mla.evaluation.measures.perplexity import measure_text_perplexity, text_tokens
from mha2mla.evaluation.measures.scoring import Request, pad_contexts, score_requests
from mha2mla.evaluation.run import measure_cache
from mha2mla.modeling import CACHE_ARGUMENT, latent_quantized_cache, quantized_cache
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
    for module in (caches, latent_quantized_cache):
        monkeypatch.setattr(module, "MEAN_TOKENS", 4)


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


@torch.no_grad()
def test_all_tokens_of_a_choice_read_the_rounded_context():
    """Against a loop over single contexts without padding, the last token of each behind the others."""
    model = make_mla()
    requests = [*REQUESTS, Request("padded", tokens(1, 8, seed=3)[0].tolist(), [[5], [6, 7, 8]])]
    for request, scored in zip(requests, score_requests(model, requests, 2, "test", KINDS["int4"]), strict=True):
        for ids, score in zip(request.continuations, scored, strict=True):
            cache = quantized_cache(model, nbits=4, residual_length=4)
            model(torch.tensor([request.context[:-1]]), **{CACHE_ARGUMENT: cache})
            rest = torch.tensor([request.context[-1:] + ids[:-1] + [0] * (3 - len(ids))])  # all are as wide as one
            logits = torch.cat([model(part, **{CACHE_ARGUMENT: cache}).logits[0] for part in rest.split(2, dim=1)])
            expected = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
            assert score.log_likelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@torch.no_grad()
def test_from_where_a_cache_is_read(name):
    """Choices of one token differ from those in full precision by the first context that is long enough, and only
    then, whatever stands beside it in a batch."""
    model, kind = make_mla(), CacheKind.parse(name)
    exact = kind.exact_tokens(model.config)
    requests = [Request(str(n), tokens(1, n, seed=n)[0].tolist(), [[5], [6]]) for n in (1, exact, exact + 1, 20)]
    both = [score_requests(model, requests, 4, "test", k) for k in (DYNAMIC, kind)]
    for request, plain, rounded in zip(requests, *both, strict=True):
        difference = max(abs(a.log_likelihood - b.log_likelihood) for a, b in zip(plain, rounded, strict=True))
        assert (difference > 1e-5) == (len(request.context) > exact)


def test_contexts_are_padded_on_the_left():
    ids, mask = pad_contexts([[5, 6, 7, 8], [9, 10], [11]])
    assert ids.tolist() == [[5, 6, 7, 8], [0, 0, 9, 10], [0, 0, 0, 11]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_prompts_of_a_batch_are_continued_as_each_alone():
    model, prompts = make_mla(), [tokens(1, n, seed=n)[0].tolist() for n in (14, 11, 9)]
    together = continue_greedily(model, TOKENIZER, prompts, 6, KINDS["int8"])
    assert together == [continue_greedily(model, TOKENIZER, [ids], 6, KINDS["int8"])[0] for ids in prompts]


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
    sizes = [row["cache_bytes_per_token"] for row in rows[1:]]
    assert sizes[0] > sizes[1] > sizes[2]
    assert set(rows[3]["tasks"]) == set(rows[1]["tasks"])
    assert "half, latent-int4" in capsys.readouterr().out


def test_no_figure_of_a_cache_that_was_not_read(models, sets, tmp_path, capsys, monkeypatch):  # noqa: F811
    """128 tokens in full precision, as in use, are more than any of these items has."""
    for module in (caches, latent_quantized_cache):
        monkeypatch.setattr(module, "MEAN_TOKENS", 128)
    assert main(arguments(models, sets, tmp_path, "--caches", "dynamic,latent-int4")) == 0
    printed = capsys.readouterr().out
    _, plain, rounded = json.loads((tmp_path / "results" / "results.json").read_text())["models"]
    assert "num_read" not in plain["tasks"]["choices"]["numbers"]
    for name, task in rounded["tasks"].items():
        assert set(task["numbers"]) == {"num_read", "num_given", "exact_tokens"}
        assert f"half, latent-int4, {name}: not measured. No item has more than 129 tokens" in printed
    rows = [line for line in printed.splitlines() if line.startswith("|") and " half, latent-int4 |" in line]
    assert rows and all(set(row.split("|")[4:-1]) <= {" " * n + "- " for n in range(40)} for row in rows)
    (headline,) = re.findall(r"^half, latent-int4: .*", printed, re.MULTILINE)
    assert re.fullmatch(r".* % less cache than the original's fp32, points lost not measured\.", headline)


def test_how_many_items_read_it_is_told(models, sets, tmp_path, capsys):  # noqa: F811
    choices = (sets / "choices.jsonl").read_text().splitlines()
    short = json.dumps(json.loads(choices[0]) | {"context": "w5"})
    (sets / "choices.jsonl").write_text("\n".join([*choices, short]))
    command = arguments(models, sets, tmp_path, "--caches", "dynamic,latent-int4", tasks="choices,agreement:texts")
    assert main([*command, "--prompt-length", "2", "--new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "half, latent-int4, choices: 6 of 7 items read rounded entries. The others have at most 5 tokens" in printed
    assert re.search(r"half, latent-int4: .* points \w+ \(6 of 7 items read rounded entries\)", printed)
    assert "half, latent-int4, agreement:texts: greedy tokens not measured. There are at most 5 tokens" in printed
    agreement = printed[printed.index("agreement:texts:") :]
    assert re.search(r"half, latent-int4 \|.*\d \| +- \| +- \|", agreement)


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
