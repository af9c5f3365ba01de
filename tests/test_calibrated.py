"""The four ideas of the preset `calibrated`, each against brute force."""

import pytest
import torch

from mha2mla.common.robust_error import robust_error
from mha2mla.conversion.architectures import architecture_of
from mha2mla.conversion.cache_plan import unrotated_rows
from mha2mla.conversion.layerwise import LayerVisit, attend
from mha2mla.conversion.presets.calibrated import closed_form as calibrated
from mha2mla.conversion.presets.calibrated import refine
from mha2mla.conversion.presets.calibrated.low_rank import joint_low_rank
from mha2mla.conversion.presets.calibrated.pair_scores import (
    mean_rotation,
    pair_moments,
    received_attention,
    score_energy,
    select_per_head,
    select_shared,
    softmax_weight,
)
from mha2mla.conversion.presets.calibrated.refine import RefineSettings
from mha2mla.conversion.presets.calibrated.shared_key import (
    components,
    head_factors,
    shared_key_basis,
    to_complex,
    to_real,
)
from mha2mla.conversion.rotary import num_rotary_pairs
from pico import ROPES, assemble, attention_of, make_source, rotation_of, tokens

H, G, F, T, D = 4, 2, 3, 6, 10  # query heads, key heads, frequencies, tokens, hidden


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def complex_randn(*shape, generator):
    return torch.randn(*shape, dtype=torch.complex128, generator=generator)


def brute_force_scores(q, k, factors, frequencies):
    """z e^{-j theta D} and z for every head, pair and m >= n: lists of [H, F, A]."""
    rotated, still, where = [], [], []
    for m in range(T):
        for n in range(m + 1):
            z = factors * q[:, m, :, None].conj() * k[:, n].T[None]
            rotated.append(z * torch.exp(-1j * frequencies * (m - n))[None, :, None])
            still.append(z)
            where.append((m, n))
    return torch.stack(rotated), torch.stack(still), where


@pytest.fixture
def scores(random):
    q = complex_randn(H, T, F, generator=random)
    k = complex_randn(G, T, F, generator=random)
    weight = torch.rand(H, T, T, dtype=torch.float64, generator=random).tril()
    factors = complex_randn(H, F, G, generator=random)
    frequencies = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    rotated, still, where = brute_force_scores(q, k, factors, frequencies)
    w = torch.stack([weight[:, m, n] for m, n in where])[:, :, None, None]
    return pair_moments(q, k, weight, frequencies), factors, rotated, still, w


def test_mean_rotation_minimises_the_weighted_error(scores):
    moments, factors, rotated, still, w = scores
    rotation, cost = mean_rotation(moments, factors, ridge=0.0)

    def error(c):
        return (w * (rotated.real - (c.conj() * still).real).square()).sum(0)

    torch.testing.assert_close(error(rotation), cost)
    for step in (1e-3, -1e-3, 1e-3j, -1e-3j):
        assert (error(rotation + step) > cost).all()
    # The two unknowns of one pair by least squares.
    h, f, a = 1, 2, 0
    z, target, weight = still[:, h, f, a], rotated[:, h, f, a].real, w[:, h, 0, 0].sqrt()
    design = torch.stack((z.real, z.imag), dim=1) * weight[:, None]
    best = torch.linalg.lstsq(design, (target * weight)[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.view_as_real(rotation[h, f, a]), best)


def test_score_energy(scores):
    moments, factors, rotated, _, w = scores
    torch.testing.assert_close(score_energy(moments, factors), (w * rotated.real.square()).sum(0))


def test_weights_of_scores_and_tokens():
    p = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    torch.testing.assert_close(softmax_weight(p), torch.tensor([[[0.0, 0.0], [0.1875, 0.1875]]]))
    torch.testing.assert_close(received_attention(p), torch.tensor([1.25, 0.75]) + 0.1)


def test_selection_keeps_the_most_costly_pairs():
    cost = torch.tensor([[5.0, 1.0], [0.0, 4.0], [3.0, 2.0]])  # [F, A]
    frequency, component = select_shared(cost, 3)
    assert (frequency.tolist(), component.tolist()) == ([[0, 1, 2]], [[0, 1, 0]])
    frequency, component = select_per_head(cost, 2)
    assert (frequency.tolist(), component.tolist()) == ([[0, 2], [1, 2]], [[0, 0], [1, 1]])


def test_complex_rows_turn_as_rope_does(random):
    x = torch.randn(2 * F, D, dtype=torch.float64, generator=random)
    torch.testing.assert_close(to_real(to_complex(x)), x)


def test_shared_key_basis_is_exact_and_its_energy_falls(random):
    k = torch.randn(G, 2 * F, D, dtype=torch.float64, generator=random)
    root = torch.randn(D, D, dtype=torch.float64, generator=random)
    covariance = root @ root.T
    power = torch.rand(H, F, dtype=torch.float64, generator=random) + 0.1
    mix, unmix = shared_key_basis(k, power, covariance)
    rows = components(k, unmix)  # [A, F, D]
    torch.testing.assert_close(torch.einsum("fga,afx->gfx", mix, rows), to_complex(k))
    # Components are uncorrelated at each frequency, and sorted by energy.
    for f in range(F):
        moment = rows[:, f] @ covariance.to(rows.dtype) @ rows[:, f].mH
        energy = moment.diagonal().real
        torch.testing.assert_close(moment, torch.diag(energy).to(moment.dtype), atol=1e-8 * energy.max(), rtol=0)
        assert (energy[:-1] >= energy[1:]).all()
    # Weighted with the queries' power, the first component alone is the best rank-one approximation of the keys.
    weight = power.view(G, H // G, F).sum(1).sqrt()
    whitened = torch.linalg.cholesky(covariance).to(torch.complex128)
    for f in range(F):
        keys = weight[:, f, None] * to_complex(k)[:, f]
        kept = weight[:, f, None] * mix[f, :, :1] * rows[:1, f]
        singular = torch.linalg.svdvals(keys @ whitened)
        torch.testing.assert_close(((keys - kept) @ whitened).norm(), singular[1:].norm())
    assert head_factors(mix, H).shape == (H, F, G)


@pytest.mark.parametrize("num_key_rows", [5, 9])  # with the 4 value rows: fewer than the 10 dims, and more
def test_joint_low_rank_is_the_best_in_the_datas_metric(num_key_rows, random):
    keys = torch.randn(num_key_rows, D, dtype=torch.float64, generator=random)
    values = 10 * torch.randn(4, D, dtype=torch.float64, generator=random)
    x = torch.randn(1000, D, dtype=torch.float64, generator=random) * torch.linspace(0.1, 3, D, dtype=torch.float64)
    root = torch.linalg.cholesky(x.T @ x / len(x))
    down, decoder = joint_low_rank(keys @ root, values @ root, root, rank=3)
    latent = x @ down.T
    torch.testing.assert_close(latent.T @ latent / len(x), torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    # Relative errors of keys and values over the text, as the truncated SVD of both, scaled to equal energy, has them.
    outputs = [x @ w.T / (x @ w.T).norm() for w in (keys, values)]
    singular = torch.linalg.svdvals(torch.cat(outputs, dim=1))
    errors = [(x @ w.T - latent @ (w @ decoder).T).square().sum() / (x @ w.T).square().sum() for w in (keys, values)]
    torch.testing.assert_close(sum(errors), singular[3:].square().sum())


def test_mixed_energy(random):
    coefficients = complex_randn(H, F, G, generator=random)
    rows = complex_randn(G, F, D, generator=random)
    expected = torch.einsum("hfa,afx->hfx", coefficients, rows).abs().square().sum()
    torch.testing.assert_close(calibrated.mixed_energy(coefficients, rows), expected)


def statistics_of(source, layer, ids, shared):
    with torch.no_grad():
        hidden = source(ids, output_hidden_states=True).hidden_states[layer]
        x = source.model.layers[layer].input_layernorm(hidden)
    rotation = rotation_of(source, layer)
    frequencies = rotation.frequencies(source.model.rotary_emb.inv_freq)
    attention = attention_of(source, layer)
    return attention, calibrated.collect_statistics(
        attention, lambda i: x[i], len(x), len(x), frequencies, shared, rotation
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rope", ["default", "yarn"])
@pytest.mark.parametrize("kind", ["gqa", "mha", "mqa", "qwen2", "llama-bias", "phi3-partial", "smollm3"])
def test_all_pairs_and_all_ranks_kept_equal_the_source(kind, rope, shared):
    if kind == "phi3-partial" and rope == "yarn":
        pytest.skip("Phi-3 takes yarn for longrope")
    source = make_source(kind, rope)
    ids = tokens(6, 24)
    layers = []
    for index in range(2):
        attention, statistics = statistics_of(source, index, ids, shared)
        groups, dim, hidden = attention.k.shape
        rope_dims = 2 * num_rotary_pairs(source.config)
        rank = min(unrotated_rows(source.config, groups * rope_dims) + groups * dim, hidden)
        rope_dims *= groups if shared else 1
        layer, metrics = calibrated.convert_attention(
            attention, statistics, rope_dims, rank, shared, rotation_of(source, index)
        )
        assert metrics["unrotation_error"] == 0.0
        assert metrics["value_energy_kept"] == pytest.approx(1.0)
        layers.append(layer)
    with torch.no_grad():
        expected, got = source(ids).logits, assemble(source, layers)(ids).logits
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()


def test_low_frequencies_cost_little_to_unrotate():
    """With every angle zero, dropping RoPE changes nothing: the cost vanishes and the best rotation is one."""
    source = make_source("gqa")
    source.model.rotary_emb.inv_freq.zero_()
    _, statistics = statistics_of(source, 0, tokens(2, 16), shared=True)
    factors = head_factors(statistics.mix, 4)
    rotation, cost = mean_rotation(statistics.moments, factors, ridge=0.0)
    assert (cost.abs() <= 1e-5 * score_energy(statistics.moments, factors)).all()
    torch.testing.assert_close(rotation, torch.ones_like(rotation), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["gqa", "qwen2"])
@pytest.mark.parametrize("rope", ROPES)
def test_functional_attention_equals_the_models(kind, rope):
    """What refinement differentiates is what the saved model computes."""
    source = make_source(kind, rope) if rope != "longrope" or kind == "gqa" else make_source(kind)
    attention, statistics = statistics_of(source, 0, tokens(2, 12), shared=True)
    layer, _ = calibrated.convert_attention(attention, statistics, 8, 10, True, rotation_of(source, 0))
    model = assemble(source, [layer, layer])
    x = torch.randn(2, 12, 48)
    positions = torch.arange(12)[None]
    with torch.no_grad():
        embeddings = source.model.rotary_emb(x, positions)
        expected = model.model.layers[0].self_attn(x, model.model.rotary_emb(x, positions))[0]
        torch.testing.assert_close(attend(layer, x, embeddings), expected, rtol=1e-4, atol=1e-5)


def test_robust_error_is_relative_and_bounded():
    wanted = torch.tensor([[[3.0, 4.0]]])
    small = robust_error(wanted + 1e-3, wanted).item()
    assert small == pytest.approx(2e-6 / 25, rel=1e-2)
    assert robust_error(wanted * 100, wanted) < 3.5  # 0.3 log(1 + 9801 / 0.3), where the plain error is 9801


@pytest.mark.parametrize("kind", ["gqa", "mixtral"])
def test_refinement_brings_the_stream_back(kind, monkeypatch):
    source = make_source(kind).requires_grad_(False)
    ids = tokens(4, 16)
    attention, statistics = statistics_of(source, 0, ids, shared=True)
    rotation = rotation_of(source, 0)
    layer, _ = calibrated.convert_attention(attention, statistics, 4, 6, True, rotation)
    states = [source.model.embed_tokens(row[None]) for row in ids]
    embeddings = source.model.rotary_emb(states[0], torch.arange(16)[None])
    architecture = architecture_of(source.config)
    frequencies = source.model.rotary_emb.inv_freq
    visit = LayerVisit(0, architecture, source.model.layers[0], states, embeddings, frequencies, rotation)

    def error(candidate):
        with torch.no_grad():
            outputs = [visit.layer_output(s, attend(candidate, visit.attention_input(s), embeddings)) for s in states]
            return sum(robust_error(o, w).item() for o, w in zip(outputs, visit.outputs, strict=True))

    monkeypatch.setattr(refine, "has_fast_bf16", lambda device: False)
    refined = refine.refine_layer(layer, visit, states, RefineSettings(60, 2, 0.02), seed=0)
    assert error(refined) < 0.6 * error(layer)
    assert refined.rope_frequencies is layer.rope_frequencies
    assert all(p.grad is None for p in source.parameters())
    # No steps, no change; the same seed, the same weights.
    assert error(refine.refine_layer(layer, visit, states, RefineSettings(0, 2, 0.02), seed=0)) == error(layer)
    again = refine.refine_layer(layer, visit, states, RefineSettings(60, 2, 0.02), seed=0)
    torch.testing.assert_close(again.latent, refined.latent)
