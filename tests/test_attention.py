"""Attention functions against brute force, and the absorbed path against the expanded one."""

import pytest
import torch
from transformers import DynamicCache

from mha2mla.modeling import CACHE_ARGUMENT, LatentShape, latent_module, quantized_cache
from mha2mla.modeling.latent_attention import (
    absorbed_attention,
    absorbed_costs_less,
    add_mask,
    expand_keys_values,
    rotary_table,
    rotate,
    select_frequencies,
)
from mha2mla.modeling.latent_module import AttentionPath
from mha2mla.modeling.latent_rotary import RotaryTableMixin
from pico import LAYOUTS, make_mla, tokens


def test_rotate_turns_each_pair_by_its_frequency():
    torch.manual_seed(0)
    head_dim, positions = 12, torch.arange(5.0)
    inv_freq = 0.7 ** torch.arange(head_dim // 2)
    angles = positions[:, None] * torch.cat((inv_freq, inv_freq))  # [T, head_dim]
    frequencies = torch.tensor([[4, 0], [1, 1]])  # two rotary key heads, a frequency used twice
    cos, sin = select_frequencies(rotary_table(angles.cos()[None], angles.sin()[None]), frequencies)
    x = torch.randn(1, 4, 5, 4)  # two heads a rotary key head
    got = rotate(x, cos, sin)
    for head in range(4):
        for pair in range(2):
            z = torch.complex(x[0, head, :, pair], x[0, head, :, pair + 2])
            z = z * torch.exp(1j * positions * inv_freq[frequencies[head // 2, pair]])
            torch.testing.assert_close(got[0, head, :, pair], z.real)
            torch.testing.assert_close(got[0, head, :, pair + 2], z.imag)


def test_a_layer_takes_the_tables_of_transformers_too():
    model, x, positions = make_mla(), torch.randn(1, 5, 48), torch.arange(3, 8)[None]
    attention, rotary = model.model.layers[0].self_attn, model.model.rotary_emb
    cos_and_sin = super(RotaryTableMixin, rotary).forward(x, positions)
    got, _ = attention(x, cos_and_sin)
    assert torch.equal(got, attention(x, rotary(x, positions))[0])


def test_an_additive_mask_of_a_wider_type():
    """What a user hands over in fp32 goes with a model in bf16."""
    torch.manual_seed(0)
    shape = LatentShape(4, 2, 4, 1, 8, 4, 4, 4)
    sizes = ((1, 4, 2, 4), (1, 4, 2, 4), (1, 1, 7, 12), (shape.expanded_width, 8))
    parts = [torch.randn(size, dtype=torch.bfloat16) for size in sizes]
    mask = torch.zeros(1, 1, 2, 7).masked_fill(torch.rand(1, 1, 2, 7) < 0.4, torch.finfo(torch.float32).min)
    got, weights = absorbed_attention(*parts, shape, 0.3, mask)
    expected, _ = absorbed_attention(*parts, shape, 0.3, mask == 0)
    assert got.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_mask_whose_memory_is_in_another_order(batch):
    """A boolean mask hands its strides on to the scores."""
    torch.manual_seed(0)
    shape = LatentShape(4, 2, 4, 1, 8, 4, 4, 4)
    sizes = ((batch, 4, 3, 4), (batch, 4, 3, 4), (batch, 1, 7, 12), (shape.expanded_width, 8))
    parts, mask = [torch.randn(size) for size in sizes], torch.rand(batch, 1, 3, 7) < 0.6
    got = absorbed_attention(*parts, shape, 0.3, mask.mT.contiguous().mT)
    torch.testing.assert_close(got, absorbed_attention(*parts, shape, 0.3, mask))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("n, nope_heads", [(1, 6), (1, 3), (3, 3), (3, 6)])
@pytest.mark.parametrize("nope", [0, 5])
def test_absorbed_equals_expanded(batch, num_queries, n, nope_heads, nope):
    """H=6, G=3: shared and per-head rotary keys, un-rotated keys per query head and per key/value head, or none."""
    torch.manual_seed(0)
    heads, groups, r, v, rank, cached = 6, 3, 4, 7, 11, 9
    shape = LatentShape(heads, groups, nope_heads, n, rank, nope, r, v)
    entries = torch.randn(batch, 1, cached, rank + n * r)
    weight = torch.randn(nope_heads * nope + groups * v, rank)
    q_nope, q_rope = torch.randn(batch, heads, num_queries, nope), torch.randn(batch, heads, num_queries, r)
    got, weights = absorbed_attention(q_nope, q_rope, entries, weight, shape, 0.3, None)

    entries = entries.squeeze(1)
    k_rope = entries[..., rank:].unflatten(-1, (n, r)).transpose(1, 2)
    keys, values = expand_keys_values(entries[..., :rank] @ weight.T, k_rope, shape)
    keys = keys.repeat_interleave(heads // nope_heads, dim=1)
    values = values.repeat_interleave(heads // nope_heads, dim=1)
    scores = torch.cat((q_nope, q_rope), dim=-1) @ keys.transpose(2, 3) * 0.3
    causal = torch.ones(num_queries, cached).tril(cached - num_queries).bool()
    expected_weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(got, (expected_weights @ values).transpose(1, 2).flatten(2))


def test_masks_of_all_implementations_mean_the_same():
    scores = torch.zeros(2, 3, 2, 5)
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    visible = torch.ones(2, 5).tril(3).bool() & padding[:, None, None].bool()  # [2, 1, 2, 5]
    additive = torch.zeros(2, 1, 2, 5).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    for mask in (padding, visible, additive):
        torch.testing.assert_close(add_mask(scores, mask).softmax(-1), expected)


def test_cost_model_prefers_absorbed_for_decoding_only():
    shape = LatentShape(
        num_attention_heads=32,
        num_key_value_heads=32,
        num_nope_key_heads=32,
        num_rope_key_heads=1,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    assert absorbed_costs_less(1, 4096, shape)
    assert absorbed_costs_less(8, 4096, shape)
    assert not absorbed_costs_less(4096, 4096, shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_model_absorbed_equals_expanded(monkeypatch, layout, implementation, num_new, padded):
    """The same step behind the same history, once through each path, and both like the run without a cache."""
    model = make_mla(layout)
    model.set_attn_implementation(implementation)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def step(absorbed: bool):
        calls = []
        monkeypatch.setattr(latent_module, "absorbed_costs_less", lambda *a: absorbed)
        monkeypatch.setattr(latent_module, "absorbed_attention", lambda *a: calls.append(1) or absorbed_attention(*a))
        with torch.no_grad():
            cut = 12 - num_new
            past = model(
                ids[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut], use_cache=True
            ).past_key_values
            logits = model(
                ids[:, cut:], attention_mask=mask, position_ids=positions[:, cut:], **{CACHE_ARGUMENT: past}
            ).logits
        assert len(calls) == (2 if absorbed else 0)
        return logits

    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits[:, -num_new:]
    torch.testing.assert_close(step(True), step(False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step(True), whole, rtol=1e-4, atol=1e-5)


def test_the_path_of_a_step_and_why(monkeypatch):
    model = make_mla()
    attention, full = model.model.layers[0].self_attn, DynamicCache(config=model.config)
    packed, narrow = quantized_cache(model), quantized_cache(model, residual_length=4)
    with torch.no_grad():
        for cache in (full, packed, narrow):
            model(tokens(2, 8), **{CACHE_ARGUMENT: cache})

    def path(num_new=1, mask=None, cache=full, probabilities=None):
        entries = torch.zeros(2, 1, num_new, model.config.latent_cache_dim)
        return attention.choose_path(cache, cache.layers[0], entries, mask, probabilities)

    expanded, absorbed, kernel = AttentionPath.EXPANDED, AttentionPath.ABSORBED, AttentionPath.KERNEL
    mask = torch.ones(2, 1, 3, 11, dtype=torch.bool)
    assert path() == path(3, mask) == (absorbed, "no kernel for this device, dtype or size")
    assert path(8, cache=DynamicCache(config=model.config)) == (expanded, "nothing is cached yet")
    assert path(65) == (expanded, "too many queries for scores to be held")
    assert path(3) == (expanded, "no mask for several queries is how sdpa is told of a prefill")
    assert path(mask="blocks") == (expanded, "the mask is one of blocks, for flex attention")
    monkeypatch.setattr(latent_module, "kernel_can_run", lambda *_: True)
    assert path() == (absorbed, "a backward pass may follow")
    with torch.no_grad():
        assert path() == path(3, mask) == path(cache=packed) == path(3, mask, packed) == (kernel, "")
        assert path(cache=narrow) == (kernel, "")
        left = "new entries may leave the window at once, and would be read rounded"
        assert path(3, mask, narrow) == (absorbed, left)
        assert path(probabilities=True) == (absorbed, "probabilities may be asked for")
        assert path(mask=mask[:, 0, 0]) == (absorbed, "the mask is one of padding, for flash attention")
        model.set_attn_implementation("eager")
        assert path() == (absorbed, "probabilities may be asked for")
        model.config._attn_implementation = "flash_attention_2"
        assert path(3) == (kernel, "")
        assert path(3, cache=packed) == (absorbed, "packed entries do not tell where the queries are")
        full.offloading = True
        assert path() == (absorbed, "an offloaded layer is on the device during its update only")
        monkeypatch.setattr(latent_module, "absorbed_costs_less", lambda *_: False)
        assert path() == (expanded, "absorbed attention costs more")
        model.train()
        assert path() == (expanded, "training")
