"""The gauge of a converted layer: another one is the same layer."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mha2mla.cli.main import main
from mha2mla.conversion.attention_weights import LatentAttention
from mha2mla.conversion.balance import balanced

HIDDEN, HEADS, GROUPS, NOPE, ROPE, RANK, VALUE = 24, 6, 2, 5, 4, 7, 3


def make_layer(nope_heads: int, rope_heads: int, bias: bool) -> LatentAttention:
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
    )
    if bias:
        layer.q_nope_bias, layer.q_rope_bias = draw(HEADS, NOPE), draw(HEADS, ROPE)
        layer.k_rope_bias, layer.o_bias = draw(rope_heads, ROPE), draw(1, HIDDEN)[0]
    layer.latent[3], layer.k_rope[:, 1::2], layer.v_up[1, 2] = 0, 0, 0
    return layer


def products(layer: LatentAttention) -> list[torch.Tensor]:
    """All that is ever multiplied, head by head and dim by dim: terms of un-rotated and rotary scores, of outputs."""
    terms = []
    heads, nope, rope, value = len(layer.q_nope), len(layer.k_up), len(layer.k_rope), len(layer.v_up)
    q_nope, q_rope, k_rope = layer.q_nope, layer.q_rope, layer.k_rope
    if layer.k_rope_bias is not None:  # another column
        q_nope = torch.cat((q_nope, layer.q_nope_bias[..., None]), dim=-1)
        q_rope = torch.cat((q_rope, layer.q_rope_bias[..., None]), dim=-1)
        k_rope = torch.cat((k_rope, layer.k_rope_bias[..., None]), dim=-1)
    for head in range(heads):
        k_up, v_up, key = (
            layer.k_up[head * nope // heads],
            layer.v_up[head * value // heads],
            k_rope[head * rope // heads],
        )
        for up, q in zip(k_up, q_nope[head], strict=True):
            terms += [number * q[:, None] * latent for number, latent in zip(up, layer.latent, strict=True)]
        half = len(key) // 2
        for i in range(len(key)):
            for j in (i, (i + half) % len(key)):  # rotation mixes a pair
                terms.append(q_rope[head, i][:, None] * key[j])
        output = layer.o[:, head * VALUE : (head + 1) * VALUE]
        for column, up in zip(output.T, v_up, strict=True):
            terms += [column[:, None] * number * latent for number, latent in zip(up, layer.latent, strict=True)]
    return terms


def rms(x: torch.Tensor, *dims: int) -> torch.Tensor:
    return x.square().mean(dims).sqrt()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("nope_heads", [GROUPS, HEADS])
@pytest.mark.parametrize("rope_heads", [1, GROUPS])
def test_no_bit_of_a_product_changes_and_sides_are_of_one_size(nope_heads, rope_heads, bias):
    layer = make_layer(nope_heads, rope_heads, bias)
    other = balanced(layer)
    assert all(map(torch.equal, products(layer), products(other)))
    assert other.o_bias is layer.o_bias and other.rope_frequencies is layer.rope_frequencies

    up = torch.cat((other.k_up.flatten(0, 1), other.v_up.flatten(0, 1)))
    heads = rms(other.q_nope.unflatten(0, (nope_heads, -1)), 1, 3).flatten()
    outputs = rms(other.o.unflatten(1, (GROUPS, HEADS // GROUPS, VALUE)), 0, 2).flatten()
    queries = rms(other.q_rope.unflatten(0, (rope_heads, -1)).unflatten(2, (2, -1)), 1, 2, 4)
    keys = rms(other.k_rope.unflatten(1, (2, -1)), 1, 3)
    for reader, maker, dead in (
        (torch.cat((heads, outputs)), rms(up, 1), 1),  # a value
        (rms(up, 0), rms(other.latent, 1), 1),
        (queries, keys, rope_heads),
    ):
        alive = maker > 0
        assert (~alive).sum() == dead
        assert (reader[alive] / maker[alive]).log2().abs().max() < 1.5

    # What is read by nothing, or reads nothing, stays.
    assert torch.equal(other.q_rope[:, 1::2], layer.q_rope[:, 1::2])
    assert torch.equal(
        other.o[:, -VALUE * HEADS // GROUPS + 2 :: VALUE], layer.o[:, -VALUE * HEADS // GROUPS + 2 :: VALUE]
    )


def test_conversions_are_written_balanced(save_source, calibration_file, tmp_path):
    text = "--data", str(calibration_file), "--samples", "2", "--length", "16", "--refine-steps", "0"
    assert main(["convert", str(save_source("gqa")), str(tmp_path / "out"), "--cache-ratio", "0.3125", *text]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    for layer in model.model.layers:
        attention = layer.self_attn
        r = attention.shape.qk_rope_head_dim
        keys = rms(attention.kv_a_proj.weight[-r:].unflatten(0, (2, -1)), 0, 2)
        queries = rms(attention.rope_query_rows().unflatten(1, (2, -1)), 0, 1, 3)
        assert (keys / queries).log2().abs().max() <= 1.01
