"""The benchmark of cache forms: each rounds what is written, and no more than its bits ask for."""

import sys
from pathlib import Path

import pytest
import torch

from mha2mla.modeling import CACHE_ARGUMENT
from mha2mla.training.trainer import round_entries
from pico import make_mla, make_source, tokens

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import fp8_entries
import pareto


@pytest.fixture(scope="module")
def models():
    return {"original": make_source(), "latents": make_mla("shared")}


@pytest.mark.parametrize(
    "name, form",
    [*(("original", form) for form in pareto.FORMS), *(("latents", form) for form in pareto.LATENT_BITS)],
)
@torch.no_grad()
def test_rounding_is_within_its_bits(models, name, form):
    model, ids = models[name], tokens(1, 24)
    kind, size = pareto.cache_form(form, model, ids)
    plain = model(ids, use_cache=False).logits.log_softmax(-1)
    found = model(ids, **{CACHE_ARGUMENT: kind.make(model)}).logits.log_softmax(-1)
    kl = (plain.exp() * (plain - found)).sum(-1).mean()
    assert 0 < size <= pareto.cache_form(pareto.PLAIN, model, ids)[1]
    if form == pareto.PLAIN:
        assert kl.abs() < 1e-6
    else:
        assert 0 < kl < {"int8": 1e-3, "fp8": 1e-2}.get(form, 1.0)


@torch.no_grad()
def test_training_on_rounded_entries_reads_what_fp8_gives_back(models):
    model, ids = make_mla("shared"), tokens(1, 24)
    round_entries(model)
    kind, _ = pareto.cache_form("fp8", model, ids)
    wanted = model(ids, **{CACHE_ARGUMENT: kind.make(model)}).logits
    torch.testing.assert_close(model.train()(ids, use_cache=False).logits, wanted)
    plain = models["latents"](ids, use_cache=False).logits
    torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, plain)
    assert not torch.allclose(wanted, plain)


def test_the_parts_of_what_fp8_costs(models):
    """Latents and keys alone cost about as much as both; without rounding nothing is lost."""
    model, blocks = models["latents"], tokens(4, 24)
    entries = fp8_entries.record_entries(model, blocks)
    assert [layer.shape for layer in entries] == [(4 * 23, model.config.latent_cache_dim)] * 2
    kl = {
        kind.name: pareto.compare(model, model, blocks, kind, 2)["kl"][0]
        for kind in fp8_entries.variants(model, entries)
    }
    both = kl["rotary keys, times 1"] + kl["latents, times 1"]
    assert 0 < kl["all but the first token"] < 2 * both
    assert both < 4 * kl["all but the first token"]
    assert all(value > 0 for value in kl.values())
    found = fp8_entries.describe(torch.tensor([[1.0, 500.0], [3.0, -500.0]]), 1)
    assert found["mean_over_deviation"] == pytest.approx(2**0.5) and found["overflows"] == 0.5
