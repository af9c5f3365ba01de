"""The dynamic layer appends in place: same contents as concatenation, without a copy per token."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from mha2mla.modeling import CACHE_ARGUMENT, LatentDynamicLayer
from pico import make_mla, tokens

RANK, WIDTH = 6, 9


def filled(*lengths: int, batch: int = 2) -> tuple[LatentDynamicLayer, torch.Tensor]:
    """A layer that was given pieces of these lengths, and what it must hold, [batch, 1, tokens, WIDTH]."""
    layer, pieces = LatentDynamicLayer(), []
    for length in lengths:
        pieces.append(torch.randn(batch, 1, length, WIDTH))
        append(layer, pieces[-1])
    return layer, torch.cat(pieces, dim=2)


@torch.no_grad()
def append(layer: LatentDynamicLayer, entries: torch.Tensor) -> torch.Tensor:
    return layer.update(entries, entries[..., :RANK])[0]


def test_appending_copies_the_history_rarely():
    layer, expected = filled(100)
    addresses = set()
    for _ in range(1000):
        entry = torch.randn(2, 1, 1, WIDTH)
        expected = torch.cat((expected, entry), dim=2)
        append(layer, entry)
        addresses.add(layer.keys.data_ptr())
    assert torch.equal(layer.keys, expected)
    assert torch.equal(layer.values, expected[..., :RANK])
    assert len(addresses) <= 17  # 64 tokens of room each time until 1,024 tokens, then more
    assert layer.nbytes == expected.numel() * 4
    assert layer.nbytes < layer.allocated_nbytes <= layer.nbytes * 17 / 16 + 64 * 2 * WIDTH * 4


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda layer: layer.crop(-3), lambda x: x[:, :, :-3]),
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), lambda x: x[[1, 1]]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), lambda x: x[[1]]),
        (lambda layer: layer.batch_repeat_interleave(2), lambda x: x[[0, 0, 1, 1]]),
        (lambda layer: (layer.offload(), layer.prefetch()), lambda x: x),
    ],
    ids=["crop", "reorder", "select", "repeat", "offload"],
)
def test_changes_keep_contents_and_room(change, rows):
    layer, entries = filled(5, 1, 4)
    change(layer)
    entries = rows(entries)
    assert torch.equal(layer.keys, entries)
    address = layer.keys.data_ptr()
    new = torch.randn(entries.shape[0], 1, 2, WIDTH)
    assert torch.equal(append(layer, new), torch.cat((entries, new), dim=2))
    assert layer.keys.data_ptr() == address  # the room survived


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(duplicate):
    layer, entries = filled(5, 1)
    twin = duplicate(layer)
    append(layer, torch.ones(2, 1, 1, WIDTH))
    append(twin, torch.zeros(2, 1, 1, WIDTH))
    assert torch.equal(layer.keys[:, :, :-1], entries) and torch.equal(twin.keys[:, :, :-1], entries)
    assert layer.keys[:, :, -1].eq(1).all() and twin.keys[:, :, -1].eq(0).all()


def test_inference_mode_caches_can_be_continued_outside():
    layer, expected = LatentDynamicLayer(), torch.randn(2, 1, 4, WIDTH)
    with torch.inference_mode():
        layer.update(expected[:, :, :3], expected[:, :, :3, :RANK])
    assert torch.equal(append(layer, expected[:, :, 3:]), expected)


def test_gradients_flow_through_a_growing_cache():
    """Two steps through a cache, then backward: the gradients of one pass over the whole sequence."""
    model = make_mla().train()
    ids = tokens(2, 8)

    def gradients(pieces) -> torch.Tensor:
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        logits = [model(piece, **{CACHE_ARGUMENT: cache}).logits for piece in pieces]
        torch.cat(logits, dim=1).square().mean().backward()
        return model.model.layers[0].self_attn.kv_a_proj.weight.grad.clone()

    torch.testing.assert_close(gradients(ids.split(1, dim=1)), gradients([ids]), rtol=1e-4, atol=1e-6)


def test_a_history_saved_for_backward_is_not_overwritten():
    layer, _ = filled(3)
    weight = torch.ones(WIDTH, requires_grad=True)
    entry = torch.randn(2, 1, 1, WIDTH)
    seen = layer.update(entry, entry[..., :RANK])[0]  # with gradients enabled
    loss = (seen * weight).sum()
    append(layer, entry)
    layer.crop(-2)
    append(layer, entry)
    expected = seen.sum((0, 1, 2))
    loss.backward()  # would raise if the buffer had been written to
    torch.testing.assert_close(weight.grad, expected)
