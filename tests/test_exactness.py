"""The contract of the model family: full rank and all pairs rotated give the source's logits."""

import pytest
import torch

from mha2mla.conversion.presets.paper.closed_form import convert_attention
from pico import LAYOUTS, ROPES, SOURCES, assemble, attention_of, exact_model, make_source, rotation_of, tokens


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [6, 48])
def test_longrope_of_a_part_of_the_head_equals_source(layout, length):
    factors = {name: ROPES["longrope"][name][:4] for name in ("short_factor", "long_factor")}
    source = make_source("phi3-partial", "longrope", **factors)
    assert_same_logits(source, exact_model(source, layout), length)


@pytest.mark.parametrize("cache", [None, "static", "quantized"])
def test_text_that_outgrows_longropes_first_table(cache):
    """The step at which the other table begins makes all keys anew: each token is the one that follows the text so
    far."""
    model = exact_model(make_source("gqa", "longrope"), "shared")
    text = model.generate(
        tokens(2, 12), max_new_tokens=9, min_new_tokens=9, do_sample=False, cache_implementation=cache
    )
    with torch.no_grad():
        for end in range(12, 21):
            assert torch.equal(model(text[:, :end]).logits[:, -1].argmax(-1), text[:, end])


@pytest.mark.parametrize("cache", [None, "static", "quantized"])
@torch.no_grad()
def test_padding_does_not_count_to_longropes_first_table(cache):
    """The largest position tells, of which padding has none: the text is read again where the table changes."""
    model = exact_model(make_source("phi3", "longrope"), "shared")
    longer, shorter = tokens(1, 10, seed=1), tokens(1, 7, seed=2)
    prompts = torch.zeros(2, 14, dtype=torch.long)
    prompts[:1, 4:], prompts[1:, 7:] = longer, shorter
    mask = (prompts > 0).long()
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True)
    output = model.generate(
        prompts, attention_mask=mask, **settings, cache_implementation=cache, return_dict_in_generate=True
    )
    for step, logits in enumerate(output.logits):
        text, seen = output.sequences[:, : 14 + step], torch.nn.functional.pad(mask, (0, step), value=1)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        expected = model(text, attention_mask=seen, position_ids=positions, use_cache=False).logits[:, -1]
        assert (logits - expected).abs().max() < (0.1 if cache == "quantized" else 1e-3), step


def test_a_prompt_that_crosses_longropes_first_table_is_not_read_in_pieces():
    model = exact_model(make_source("phi3", "longrope"), "shared")
    with pytest.raises(ValueError, match=r"the 16 tokens .* a part of 5.* Leave out prefill_chunk_size"):
        model.generate(tokens(1, 26), max_new_tokens=1, prefill_chunk_size=5)
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    pieces, whole = (model.generate(tokens(1, 14), prefill_chunk_size=size, **settings) for size in (5, None))
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "head-dim"])
def test_unrotated_dims_without_compression_equal_source_with_those_angles_zero(kind):
    """svd="none": the only change is that the dropped frequencies no longer turn. The source with these frequencies
    set to zero is the brute-force reference."""
    source = make_source(kind)
    attention = attention_of(source, 0)
    groups, dim, _ = attention.k.shape
    kept = torch.tensor([0, 2])
    rank = groups * (2 * dim - 4)
    pairs = kept.repeat(groups, 1)
    layers = [
        convert_attention(attention_of(source, i), pairs, rank, "none", rotation_of(source, i)) for i in range(2)
    ]
    converted = assemble(source, layers)
    still = torch.ones(dim // 2, dtype=torch.bool)
    still[kept] = False
    source.model.rotary_emb.inv_freq[still] = 0.0
    assert_same_logits(source, converted)


@pytest.mark.parametrize("rope", ["yarn", "longrope"])
def test_attention_factor_reaches_unrotated_dims(rope):
    source = make_source("gqa", rope)
    rotation = rotation_of(source, 0)
    assert rotation.scaling != 1.0
    attention = attention_of(source, 0)
    groups, dim, _ = attention.k.shape
    pairs = torch.tensor([[0, 1], [0, 3]])
    layers = [
        convert_attention(attention_of(source, i), pairs, groups * (2 * dim - 4), "none", rotation) for i in (0, 1)
    ]
    converted = assemble(source, layers)
    # At position 0 nothing turns, so one-token texts must agree, factor included; two tokens at position 0 as well.
    ids, positions = tokens(2, 5), torch.zeros(2, 5, dtype=torch.long)
    mask = torch.ones(2, 5)
    with torch.no_grad():
        expected = source(ids, position_ids=positions, attention_mask=mask).logits
        got = converted(ids, position_ids=positions, attention_mask=mask).logits
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()
