"""The contract of the model family: full rank and all pairs rotated give the source's logits."""

import pytest
import torch

from mha2mla.conversion.presets.paper.closed_form import convert_attention
from mha2mla.conversion.rotary import rope_attention_scaling
from pico import LAYOUTS, ROPES, SOURCES, assemble, attention_of, exact_model, make_source, tokens


def assert_same_logits(source, converted, length=24):
    ids = tokens(2, length)
    with torch.no_grad():
        expected, got = source(ids).logits, converted(ids).logits
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SOURCES)
def test_full_rank_equals_source(kind, layout):
    source = make_source(kind)
    assert_same_logits(source, exact_model(source, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [r for r in ROPES if r != "default"])
@pytest.mark.parametrize("length", [6, 48])  # below and beyond every length at which a scaling type changes
def test_every_rope_type_equals_source(rope, layout, length):
    source = make_source("gqa", rope)
    assert_same_logits(source, exact_model(source, layout), length)


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "head-dim"])
def test_unrotated_dims_without_compression_equal_source_with_those_angles_zero(kind):
    """svd="none": the only change is that the dropped frequencies no longer turn. The source with these frequencies
    set to zero is the brute-force reference."""
    source = make_source(kind)
    attention = attention_of(source, 0)
    groups, dim, _ = attention.k.shape
    kept = torch.tensor([0, 2])
    rank = groups * (2 * dim - 4)
    layers = [convert_attention(attention_of(source, i), kept.repeat(groups, 1), rank, "none") for i in range(2)]
    converted = assemble(source, layers)
    still = torch.ones(dim // 2, dtype=torch.bool)
    still[kept] = False
    source.model.rotary_emb.inv_freq[still] = 0.0
    assert_same_logits(source, converted)


@pytest.mark.parametrize("rope", ["yarn", "longrope"])
def test_attention_factor_reaches_unrotated_dims(rope):
    source = make_source("gqa", rope)
    scaling = rope_attention_scaling(source.config)
    assert scaling != 1.0
    attention = attention_of(source, 0)
    groups, dim, _ = attention.k.shape
    pairs = torch.tensor([[0, 1], [0, 3]])
    layers = [
        convert_attention(attention_of(source, i), pairs, groups * (2 * dim - 4), "none", scaling) for i in (0, 1)
    ]
    converted = assemble(source, layers)
    # At position 0 nothing turns, so one-token texts must agree, factor included; two tokens at position 0 as well.
    ids, positions = tokens(2, 5), torch.zeros(2, 5, dtype=torch.long)
    mask = torch.ones(2, 5)
    with torch.no_grad():
        expected = source(ids, position_ids=positions, attention_mask=mask).logits
        got = converted(ids, position_ids=positions, attention_mask=mask).logits
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()
