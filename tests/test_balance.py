"""The gauge of a converted layer: another one is the same layer."""

import pytest
import torch

from mha2mla.conversion.attention_weights import LatentAttention
from mha2mla.conversion.balance import balanced

HIDDEN, HEADS, GROUPS, NOPE, ROPE, RANK, VALUE = 24, 6, 2, 5, 4, 7, 3


def make_layer(nope_heads: int, rope_heads: int) -> LatentAttention:
    """Sizes as a conversion leaves them, and worse: a dead latent, a dead pair, a dead value."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
        spread = torch.exp(2 * torch.randn(shape[:-1], generator=generator))[..., None]
        return size * spread * torch.randn(shape, generator=generator)

    layer = LatentAttention(
        q_nope=draw(HEADS, NOPE, HIDDEN),
        q_rope=draw(HEADS, ROPE, HIDDEN, size=0.03),
        latent=draw(RANK, HIDDEN),
        k_rope=draw(rope_heads, ROPE, HIDDEN, size=2.0),
        k_up=draw(nope_heads, NOPE, RANK),
        v_up=draw(GROUPS, VALUE, RANK),
        o=draw(HEADS * VALUE, HIDDEN).T.contiguous(),
        rope_frequencies=torch.arange(ROPE // 2).repeat(rope_heads, 1),
        q_nope_bias=draw(HEADS, NOPE),
        q_rope_bias=draw(HEADS, ROPE),
        k_rope_bias=draw(rope_heads, ROPE),
        o_bias=draw(1, HIDDEN)[0],
    )
    layer.latent[3], layer.k_rope[:, 1::2], layer.v_up[1, 2] = 0, 0, 0
    return layer


def products(layer: LatentAttention) -> list[torch.Tensor]:
    """All that is ever multiplied, head by head and dim by dim: terms of un-rotated and rotary scores, of outputs."""
    terms = []
    heads, nope, rope, value = len(layer.q_nope), len(layer.k_up), len(layer.k_rope), len(layer.v_up)
    for head in range(heads):
        k_up, v_up = layer.k_up[head // (heads // nope)], layer.v_up[head // (heads // value)]
        key, key_bias = layer.k_rope[head // (heads // rope)], layer.k_rope_bias[head // (heads // rope)]
        for up, q, bias in zip(k_up, layer.q_nope[head], layer.q_nope_bias[head], strict=True):
            for number, latent in zip(up, layer.latent, strict=True):
                terms += [number * q[:, None] * latent, number * bias * latent]
        query, query_bias = layer.q_rope[head], layer.q_rope_bias[head]
        half = len(key) // 2
        for i in range(len(key)):
            for j in (i, (i + half) % len(key)):  # rotation mixes a pair
                makers, readers = (key[j], key_bias[j]), (query[i][:, None], query_bias[i])
                terms += [maker * reader for maker in makers for reader in readers]
        output = layer.o[:, head * VALUE : (head + 1) * VALUE]
        for column, up in zip(output.T, v_up, strict=True):
            terms += [column[:, None] * number * latent for number, latent in zip(up, layer.latent, strict=True)]
    return terms


@pytest.mark.parametrize("nope_heads", [GROUPS, HEADS])
@pytest.mark.parametrize("rope_heads", [1, GROUPS])
def test_no_bit_of_a_product_changes_and_sides_are_of_one_size(nope_heads, rope_heads):
    layer = make_layer(nope_heads, rope_heads)
    other = balanced(layer)
    assert all(map(torch.equal, products(layer), products(other)))
    assert torch.equal(other.o_bias, layer.o_bias) and torch.equal(other.rope_frequencies, layer.rope_frequencies)

    def rms(x: torch.Tensor, *dims: int) -> torch.Tensor:
        return x.square().mean(dims).sqrt()

    up = torch.cat((other.k_up.flatten(0, 1), other.v_up.flatten(0, 1)))
    heads = rms(other.q_nope.unflatten(0, (nope_heads, -1)), 1, 3).flatten()
    outputs = rms(other.o.unflatten(1, (GROUPS, HEADS // GROUPS, VALUE)), 0, 2).flatten()
    queries = rms(other.q_rope.unflatten(0, (rope_heads, -1)).unflatten(2, (2, -1)), 1, 2, 4)
    for reader, maker in (
        (torch.cat((heads, outputs)), rms(up, 1)),
        (rms(up, 0), rms(other.latent, 1)),
        (queries, rms(other.k_rope.unflatten(1, (2, -1)), 1, 3)),
    ):
        alive = (reader > 0) & (maker > 0)
        assert alive.sum() > 0.4 * alive.numel()
        assert (reader[alive] / maker[alive]).log2().abs().max() < 1.5
    assert torch.equal(other.latent[3], layer.latent[3])
