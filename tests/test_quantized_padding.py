"""Quantised caches behind padding on the left: the token that attention rests on keeps full precision in every row."""

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from mha2mla.modeling import (
    CACHE_ARGUMENT,
    latent_module,
    latent_quantized_cache,
    latent_static_quantized_cache,
    quantized_cache,
)
from mha2mla.modeling.latent_attention import first_visible
from mha2mla.modeling.latent_quantized_entries import swap_first
from pico import LAYOUTS, make_mla, tokens

PADS = torch.tensor([0, 3, 5])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def quantise_short_sequences(monkeypatch):
    for module in (latent_quantized_cache, latent_static_quantized_cache):
        monkeypatch.setattr(module, "MEAN_TOKENS", 2)


@pytest.fixture(params=LAYOUTS)
def model(request):
    return make_mla(request.param).to(DEVICE)


def padded(ids: torch.Tensor, pads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, S] behind so many pads each, [B, max(pads) + S], and their mask."""
    most = int(pads.max())
    rows = [torch.cat((ids.new_zeros(n), row, ids.new_zeros(most - n))) for n, row in zip(pads, ids, strict=True)]
    mask = (torch.arange(most + ids.shape[1]) >= pads[:, None]).long().to(ids.device)
    return torch.stack(rows), mask


@pytest.mark.parametrize("shape, dim", [((3, 7, 2), 1), ((3, 1, 7, 2), 2), ((1, 1, 4, 7), -1)])
def test_first_and_one_other_change_places_in_each_row(shape, dim):
    x, positions = torch.randn(shape), torch.tensor([0, 6, 2])
    expected = x.expand(3, *shape[1:]).clone()
    for row, position in zip(expected, positions, strict=True):
        row = row.movedim(dim - (dim > 0), 0)
        row[[0, int(position)]] = row[[int(position), 0]]
    got = swap_first(x, positions, dim)
    assert torch.equal(got, expected)
    assert torch.equal(swap_first(got, positions, dim), x.expand_as(got))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("static", [False, True])
def test_where_texts_begin_is_read_from_every_form_of_mask(implementation, static):
    ids, mask = padded(tokens(3, 6), PADS)
    if static and implementation in ("flash_attention_2", "flex_attention"):
        pytest.skip("has no mask for tokens to come")
    config = make_mla("shared").config
    config._attn_implementation = implementation

    def made(mask):
        if implementation == "flash_attention_2":
            return mask
        cache = quantized_cache(make_mla("shared"), max_cache_len=20) if static else None
        embeds = torch.zeros(3, ids.shape[1], 4)
        return create_causal_mask(config=config, inputs_embeds=embeds, attention_mask=mask, **{CACHE_ARGUMENT: cache})

    assert first_visible(made(mask), ids.shape[1]).tolist() == PADS.tolist()
    assert first_visible(made(torch.ones_like(mask)), ids.shape[1]) is None
    assert first_visible(None, ids.shape[1]) is None


@pytest.mark.parametrize("settings", [{}, {"max_cache_len": 40}])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_padding_changes_no_step(monkeypatch, model, settings, by_kernel):
    """Logits of rows padded by 0, 3 and 5 in one batch are those of the rows alone, whose codes they share."""
    if by_kernel:
        pytest.importorskip("triton")
        monkeypatch.setattr(latent_module, "kernel_can_run", lambda *_: True)
    ids, prompt = tokens(3, 30).to(DEVICE), 20

    def steps(ids: torch.Tensor, mask: torch.Tensor, prompt: int) -> torch.Tensor:
        cache = quantized_cache(model, nbits=4, residual_length=4, **settings)
        positions, logits = (mask.cumsum(-1) - 1).clamp(min=0), []
        with torch.no_grad():
            for start, end in ((0, prompt), *((i, i + 1) for i in range(prompt, prompt + 8))):
                out = model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    **{CACHE_ARGUMENT: cache},
                )
                logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    batch, mask = padded(ids, PADS)
    got = steps(batch, mask, prompt)
    for i, pads in enumerate(PADS.tolist()):
        alone = ids[i : i + 1]
        expected = steps(alone, torch.ones_like(alone), prompt - pads)
        error = (got[i] - expected[0]).norm() / expected.norm()
        assert error < 0.02, (i, pads, error)


@pytest.mark.parametrize("settings", [{}, {"max_cache_len": 40}])
def test_first_of_the_text_is_remembered_exactly_whatever_becomes_of_the_rows(model, settings):
    ids, mask = padded(tokens(3, 20).to(DEVICE), PADS)
    cache = quantized_cache(model, nbits=4, residual_length=4, **settings)
    layer, given = cache.layers[0], []
    update = layer.update
    layer.update = lambda entries, *rest, **kwargs: given.append(entries) or update(entries, *rest, **kwargs)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache})

    def first(entries, order) -> torch.Tensor:
        return torch.stack([entries[i, 0, PADS[row]] for i, row in enumerate(order)])

    exact = torch.stack([given[0][row, 0, PADS[row]] for row in range(3)])
    for change, order in (
        (lambda: None, [0, 1, 2]),
        (lambda: cache.reorder_cache(torch.tensor([2, 2, 1], device=DEVICE)), [2, 2, 1]),
        (lambda: cache.batch_select_indices(torch.tensor([2, 0], device=DEVICE)), [1, 2]),
        (lambda: cache.batch_repeat_interleave(2), [1, 1, 2, 2]),
    ):
        change()
        torch.testing.assert_close(first(layer.dequantized(), order), exact[order], rtol=1e-4, atol=1e-4)
    cache.reset()
    assert layer.sinks is None and layer.is_new


def test_cropping_into_padding_leaves_nothing_to_keep():
    model = make_mla("shared").to(DEVICE)
    ids, mask = padded(tokens(3, 20).to(DEVICE), PADS)
    cache = quantized_cache(model, nbits=8, residual_length=4)
    with torch.no_grad():
        model(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache})
    cache.crop(4 - ids.shape[1])
    assert cache.layers[0].sinks.tolist() == [0, 3, 0]
    cache.crop(-4)
    assert cache.layers[0].is_new


@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_compiled_step_behind_padding_is_one_graph(monkeypatch, by_kernel):
    torch._dynamo.reset()
    if by_kernel:
        pytest.importorskip("triton")
    monkeypatch.setattr(latent_module, "kernel_can_run", lambda *_: by_kernel)
    model, graphs = make_mla("shared").to(DEVICE), []
    ids, mask = padded(tokens(3, 20).to(DEVICE), PADS)
    mask = torch.nn.functional.pad(mask, (0, 40 - mask.shape[1]), value=1)  # of the whole cache
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def steps(step) -> torch.Tensor:
        cache, logits = quantized_cache(model, nbits=4, residual_length=4, max_cache_len=40), []
        with torch.no_grad():
            model(ids[:, :16], attention_mask=mask, position_ids=positions[:, :16], **{CACHE_ARGUMENT: cache})
            for i in range(16, 20):
                place = positions[:, i : i + 1].clone()
                out = step(ids[:, i : i + 1], attention_mask=mask, position_ids=place, **{CACHE_ARGUMENT: cache})
                logits.append(out.logits)
        return torch.cat(logits, 1)

    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    torch.testing.assert_close(steps(compiled), steps(model), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
