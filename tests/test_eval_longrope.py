"""Texts that outgrow longrope's first table (16 tokens here), against single passes without a cache."""

import json

import pytest
import torch
from conftest import pico_tokenizer

from mha2mla.cli.main import main
from mha2mla.evaluation.caches import DYNAMIC, CacheKind
from mha2mla.evaluation.measures.agreement import kl_divergence
from mha2mla.evaluation.measures.perplexity import measure_text_perplexity, token_losses
from mha2mla.evaluation.measures.scoring import Request, score_requests
from mha2mla.modeling import CACHE_ARGUMENT
from pico import exact_model, make_source, tokens

VLLM = CacheKind.parse("vllm-fp8")


def make_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    source = make_source("phi3", "longrope")
    return source, exact_model(source, "shared")


@pytest.fixture(params=["source", "converted"])
def model(request):
    return make_models()[request.param == "converted"]


@torch.no_grad()
def in_one_pass(model, ids: list[int], **inputs) -> torch.Tensor:
    """Log-likelihood of each token but the first."""
    logits = model(torch.tensor([ids[:-1]]), **inputs).logits[0]
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("length", [17, 18, 28])
def test_a_text_that_crosses_is_read_in_one_pass(model, length):
    ids = tokens(1, length, seed=length)[0]
    expected = -in_one_pass(model, ids.tolist(), use_cache=False)
    torch.testing.assert_close(token_losses(model, ids, chunk=5), expected, atol=1e-4, rtol=1e-4)
    rounded = -in_one_pass(model, ids.tolist(), **{CACHE_ARGUMENT: VLLM.make(model)})
    torch.testing.assert_close(token_losses(model, ids, 5, VLLM), rounded, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_agreement_of_a_text_that_crosses():
    source, model = make_models()
    other, ids = make_source("phi3", "longrope", seed=1), tokens(1, 28)[0]
    divergence, _ = kl_divergence(source, other, ids, chunk=5)
    p, q = (m(ids[None], use_cache=False).logits[0].log_softmax(-1) for m in (source, other))
    torch.testing.assert_close(divergence, (p.exp() * (p - q)).sum(-1), atol=1e-4, rtol=1e-4)
    assert kl_divergence(source, model, ids, chunk=5)[0].abs().max() < 1e-4


def test_each_choice_is_scored_by_its_own_table(model):
    """Contexts shorter than the first table, as long and longer, and choices that cross beside some that do not: none
    changes another's table."""
    sizes = {4: (1, 10), 12: (2, 5, 9), 15: (1, 2, 3), 16: (1, 2), 17: (1, 6), 20: (3, 4)}
    requests = [
        Request(str(n), tokens(1, n, seed=n)[0].tolist(), [tokens(1, size, seed=40 + size)[0].tolist() for size in of])
        for n, of in sizes.items()
    ]
    for batch_size in (1, 8):
        for request, scored in zip(requests, score_requests(model, requests, batch_size, "test"), strict=True):
            for ids, score in zip(request.continuations, scored, strict=True):
                expected = in_one_pass(model, request.context + ids, use_cache=False)[-len(ids) :].sum().item()
                assert score.log_likelihood == pytest.approx(expected, abs=1e-3), (request.name, len(ids))


def test_a_quantised_cache_takes_choices_on_one_side(monkeypatch):
    """The pieces behind a prefill of more than 16 tokens are of one table; those that cross are refused."""
    _, model = make_models()
    int8, choices = CacheKind.parse("int8"), [[5, 6, 7], [8]]
    requests = [Request(str(n), tokens(1, n, seed=n)[0].tolist(), choices) for n in (3, 14, 18, 20)]
    plain, fine = (
        [s.log_likelihood for row in score_requests(model, requests, 4, "", k) for s in row] for k in (DYNAMIC, int8)
    )
    assert fine == pytest.approx(plain, abs=0.05)
    for size in (15, 17):
        with pytest.raises(ValueError, match=f"Item x is read up to {size + 2} tokens, .* int8, .* ends at 16"):
            score_requests(model, [Request("x", [5] * size, choices)], 4, "", int8)
    with pytest.raises(ValueError, match="A text is read up to 17 tokens"):
        measure_text_perplexity(model, pico_tokenizer(), ["w5 " * 17], 32, None, int8)


ITEMS = {
    "text": {"text": "w5 " * 20},
    "choice": {"id": "c", "context": "w5 " * 14, "choices": ["w7", "w8 w9 w10 w11"], "answer": 0},
    "retrieval": {"id": "r", "context": "w5 " * 14, "target": " w7 w8 w9 w10"},
}
SHORTER = "Shorten the item or leave it out"


@pytest.mark.parametrize(
    ("name", "task", "options", "read", "remedy"),
    [
        ("text", "text", "--length 17", "text is read up to 17", "Give --length 16 or less"),
        (
            "text",
            "positions:text",
            "--long-length 18",
            "positions:text is read up to 17",
            "Give --long-length 17 or less",
        ),
        (
            "text",
            "agreement:text",
            "--agreement-length 17",
            "agreement:text is read up to 17",
            "Give --agreement-length 16",
        ),
        ("choice", "choice", "", "choice, item c, is read up to 17", SHORTER),
        ("retrieval", "retrieval", "", "retrieval, item r, is read up to 17", SHORTER),
    ],
)
def test_a_quantised_cache_of_two_tables_is_refused_first(name, task, options, read, remedy, tmp_path, capsys):
    folders = [str(tmp_path / "source"), str(tmp_path / "converted")]
    for model, folder in zip(make_models(), folders, strict=True):
        model.save_pretrained(folder)
        pico_tokenizer().save_pretrained(folder)
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ITEMS[name]) + "\n")
    sizes = "--length 16 --long-length 17 --agreement-length 16 --prompt-length 4 --new-tokens 4".split()
    command = ["eval", *folders, "--data", str(tmp_path / f"{name}.jsonl"), "--tasks", task, *sizes, *options.split()]
    assert main([*command, "--caches", "dynamic,latent-int8", "--output", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert f"{read} tokens, in pieces through the cache latent-int8, and longrope's first table ends at 16" in error
    assert remedy in error and "--caches dynamic" in error and not (tmp_path / "results").exists()
    assert main([*command, "--caches", "dynamic", "--output", str(tmp_path / "results")]) == 0
