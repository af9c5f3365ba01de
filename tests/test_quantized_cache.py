"""The quantised cache: transformers' words, latents only, exact bytes, and what every way to generate does to it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from mha2mla.modeling import (
    CACHE_ARGUMENT,
    LatentQuantizedLayer,
    cache_nbytes,
    latent_quantized_cache,
    quantized_cache,
)
from mha2mla.modeling.latent_quantization import (
    CODE_BITS,
    dequantize,
    importance,
    pack,
    quantize,
    random_rotation,
    round_fp8,
    unpack,
)
from mha2mla.training import add_lora
from pico import FORMS, LAYOUTS, make_mla, make_source, tokens

NEW = 10


@pytest.fixture(autouse=True)
def quantise_short_sequences(monkeypatch):
    monkeypatch.setattr(latent_quantized_cache, "MEAN_TOKENS", 2)


@pytest.fixture(params=LAYOUTS)
def model(request):
    return make_mla(request.param)


@pytest.mark.parametrize("form", FORMS)
def test_eight_bits_change_little_in_every_family(form):
    model, ids = make_mla(form, seed=2), tokens(2, 24)  # of this seed, no token changes its expert
    cache = quantized_cache(model, nbits=8, residual_length=4)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = [model(part, **{CACHE_ARGUMENT: cache}).logits for part in ids.split([12] + [1] * 12, dim=1)]
    assert (torch.cat(got, dim=1) - expected).norm() <= 0.01 * expected.norm()


def generate(model, ids, nbits=8, residual_length=4, **kwargs):
    return model.generate(
        ids,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        cache_implementation="quantized",
        cache_config=dict(nbits=nbits, residual_length=residual_length),
        **kwargs,
    )


@pytest.mark.parametrize("columns", [1, 7, 12])
@pytest.mark.parametrize("nbits", [4, 8])
def test_packing_is_exact(columns, nbits):
    codes = torch.randint(0, 2**nbits, (3, columns), dtype=torch.uint8)
    packed = pack(codes, nbits)
    assert packed.dtype == torch.int16 and packed.shape[-1] == -(-columns * nbits // 16)
    assert torch.equal(unpack(packed, nbits, columns), codes)


@pytest.mark.parametrize("nbits", [4, 8])
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_error_is_at_most_half_a_step(nbits, offset):
    """The step of a group is its range over 2**nbits - 1, up to the rounding of the scale to eighths of an octave, and
    to what clipping cuts off."""
    torch.manual_seed(0)
    x = torch.randn(50, 23) * torch.logspace(-4, 3, 50)[:, None] * (1 + abs(offset)) + offset
    codes, scales = quantize(x, f"int{nbits}", 8)
    assert scales.shape == (50, 6)
    groups = torch.nn.functional.pad(x, (0, 1)).unflatten(-1, (3, 8))
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    step = (span / (2**nbits - 1) * 2**0.125).repeat_interleave(8, -1)[:, :23]
    assert ((dequantize(codes, scales, f"int{nbits}", 8) - x).abs() <= step * (0.6 if nbits == 8 else 1.6)).all()


def test_fp8_errs_by_a_sixteenth_of_a_number_or_little_of_the_largest():
    torch.manual_seed(0)
    x = torch.randn(50, 23) * torch.logspace(-4, 3, 50)[:, None]
    codes, scales = quantize(x, "fp8", 8)
    assert (scales[:, 1::2] == 0).all()
    groups = torch.nn.functional.pad(x, (0, 1)).unflatten(-1, (3, 8))
    largest = groups.abs().amax(-1).repeat_interleave(8, -1)[:, :23]
    error = (dequantize(codes, scales, "fp8", 8) - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, largest * 2**-16)).all()


def test_what_training_rounds_is_e4m3_of_torch_for_every_number_and_the_gradient_passes():
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    numbers = torch.cat((numbers[numbers.isfinite()].float(), torch.randn(10_000) * 100, torch.randn(10_000) / 100))
    for x in (numbers, numbers.bfloat16()):
        x.requires_grad_()
        found = round_fp8(x)
        torch.testing.assert_close(found, x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype), rtol=0, atol=0)
        found.sum().backward()
        assert (x.grad == 1).all()


@pytest.mark.parametrize("form", CODE_BITS)
def test_zeros_stay_zeros(form):
    codes, scales = quantize(torch.zeros(2, 8), form, 8)
    assert dequantize(codes, scales, form, 8).abs().max() < 1e-5


def test_rotation_is_orthogonal():
    torch.testing.assert_close(random_rotation(10) @ random_rotation(10).T, torch.eye(10))


def test_importance_is_the_best_factor_in_any_gauge():
    generator = torch.Generator().manual_seed(0)
    readers, makers, gauge = (torch.exp(torch.randn(9, generator=generator)) for _ in range(3))

    def cost(factors: torch.Tensor) -> torch.Tensor:
        """Of one step for all channels: what its errors do to the output, and how large it has to be."""
        return (readers / factors).square().sum() * (makers * factors).square().sum()

    factors = importance(readers, makers)
    for _ in range(100):
        assert cost(factors) <= cost(factors * torch.exp(0.1 * torch.randn(9, generator=generator)))
    other = importance(readers / gauge, makers * gauge) * gauge
    torch.testing.assert_close(other / other[0], factors / factors[0])
    assert factors.log().mean().abs() < 1e-6


@pytest.mark.parametrize("mode", [{}, dict(num_beams=3), dict(prefill_chunk_size=4), dict(prompt_lookup_num_tokens=3)])
def test_eight_bits_give_the_tokens_of_the_run_without_cache(model, mode):
    """Beams reorder the cache and prompt lookup crops it."""
    # Seed 0 comes to two tokens 0.009 apart, of a spread of 1.4, which 8 bits may swap.
    ids = tokens(1, 4).repeat(1, 3) if "prompt_lookup_num_tokens" in mode else tokens(2, 12, seed=1)
    beams = {name: value for name, value in mode.items() if name == "num_beams"}
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    expected = model.generate(ids, use_cache=False, **beams, **settings)
    assert generate(model, ids, **mode).tolist() == expected.tolist()


@pytest.mark.parametrize("nbits", [4, 8])
def test_history_is_remembered_within_the_error_of_its_codes(model, nbits):
    ids = tokens(2, 30)
    exact, quantised = DynamicCache(config=model.config), quantized_cache(model, nbits=nbits, residual_length=4)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: exact})
        model(ids, **{CACHE_ARGUMENT: quantised})
    layer, entries = quantised.layers[0], exact.layers[0].keys
    remembered = layer.dequantized()
    for part in (slice(0, 1), slice(28, 30)):  # the first token and the recent ones
        torch.testing.assert_close(remembered[:, :, part], entries[:, :, part])
    error = (remembered - entries).norm() / entries.norm()
    assert 0 < error < (0.1 if nbits == 4 else 0.006)


def test_bytes_count_codes_scales_mean_and_window(model):
    config = model.config
    rank, rope = config.kv_lora_rank, config.num_rope_key_heads * config.qk_rope_head_dim
    cache = quantized_cache(model.bfloat16(), nbits=4, residual_length=4)
    with torch.no_grad():
        model(tokens(3, 25), **{CACHE_ARGUMENT: cache})
    full, packed = 1 + 2, 25 - 1 - 2  # the first and half a window
    per_token = (
        2 * -(-rank // 4) + 2 * -(-rope // 4) + 4
    )  # words of four codes, and a scale and a zero for the latent, and for the rotary keys
    width = rank + rope
    assert cache_nbytes(cache) == config.num_hidden_layers * 3 * (packed * per_token + full * width * 2 + width * 2)


@pytest.mark.parametrize("backend", ["latent", "fp8"])
def test_a_long_prompt_is_not_held_beside_its_codes(backend):
    """A view of the first token, or of the window, would keep the memory of all of it."""
    model = make_mla("shared")
    cache = quantized_cache(model, backend)
    with torch.no_grad():
        model(tokens(2, 900), logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    for layer in cache.layers:
        for part in (layer.first, layer.recent, layer.mean):
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
        for buffer in (layer.codes, layer.scales):
            room = buffer.data.shape[2] - buffer.length
            assert room <= max(buffer.MIN_ROOM, buffer.length // buffer.ROOM_SHARE)
            assert buffer.allocated_nbytes == buffer.data.numel() * buffer.data.element_size()


def test_a_cache_cropped_to_nothing_is_as_new():
    model, ids = make_mla("shared"), tokens(1, 30)
    cache, fresh = (quantized_cache(model, residual_length=4) for _ in range(2))
    with torch.no_grad():
        model(tokens(1, 40, seed=5), **{CACHE_ARGUMENT: cache})
        cache.crop(-40)
        assert cache.get_seq_length() == 0
        for each in (cache, fresh):
            model(ids, **{CACHE_ARGUMENT: each})
    assert cache.layers[0].codes.length == fresh.layers[0].codes.length
    assert torch.equal(cache.layers[0].dequantized(), fresh.layers[0].dequantized())


def test_select_repeat_reorder_crop_copy_and_reset(model):
    ids = tokens(3, 14)
    cache = quantized_cache(model, nbits=8, residual_length=4)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
        cache.crop(-4)  # beyond the window
        assert cache.get_seq_length() == 10
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)  # rows 2, 2, 0, 0
        cache.reorder_cache(torch.tensor([3, 0]))  # rows 0, 2
        twin = copy.deepcopy(cache)
        rows = ids[[0, 2]]
        got = model(rows[:, 10:], **{CACHE_ARGUMENT: cache}).logits
        expected = model(rows, use_cache=False).logits[:, 10:]
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
        assert twin.get_seq_length() == 10
        torch.testing.assert_close(model(rows[:, 10:], **{CACHE_ARGUMENT: twin}).logits, got)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache_nbytes(cache) == 0
        again = model(ids, **{CACHE_ARGUMENT: cache}).logits
    torch.testing.assert_close(again, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_generate_takes_the_same_cache_config_twice_and_defaults_to_ours(model):
    settings = dict(nbits=8)
    ids = tokens(1, 6)
    for _ in range(2):
        out = model.generate(
            ids,
            max_new_tokens=3,
            cache_implementation="quantized",
            cache_config=settings,
            return_dict_in_generate=True,
        )
        assert type(out.past_key_values.layers[0]) is LatentQuantizedLayer
    assert settings == dict(nbits=8)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(nbits=2), "nbits must be 4 or 8"),
        (dict(nbits="4"), "nbits must be 4 or 8 for the backend 'latent', got '4'"),
        (
            dict(nbit=8),
            "no setting nbit of a quantised cache; there are backend, nbits, q_group_size, residual_length",
        ),
        (dict(backend="quanto", group_size=16), "no setting group_size"),
        (dict(q_group_size=0), "q_group_size must be at least 1"),
        (dict(residual_length=0), "residual_length must be at least 1"),
        (dict(backend="fp8", nbits=4), "'fp8' has 8 bits, got nbits=4"),
        (dict(backend="hqq", max_cache_len=9), "'hqq' cannot be static"),
        (dict(backend="gguf"), "'latent', 'fp8', 'quanto' or 'hqq', got 'gguf'"),
    ],
)
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        quantized_cache(make_mla(), **settings)


def test_it_is_for_latents_whatever_wraps_the_model():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no latents to quantise: convert the model first"):
        quantized_cache(make_source())
    adapted = add_lora(make_mla(), 2, 4, 0.0, ["q_proj"])
    assert len(quantized_cache(adapted, nbits=8).layers) == 2


@pytest.mark.parametrize("backend, package", [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_backends_of_transformers_hold_entries_only(model, backend, package):
    pytest.importorskip(package)
    cache = quantized_cache(model, backend=backend, nbits=4, residual_length=4, q_group_size=2)
    ids = tokens(2, 12)
    with torch.no_grad():
        model(ids[:, :8], **{CACHE_ARGUMENT: cache})
        got = model(ids[:, 8:], **{CACHE_ARGUMENT: cache}).logits
        expected = model(ids, use_cache=False).logits[:, 8:]
    assert (got - expected).norm() / expected.norm() < 0.4
    assert cache.get_seq_length() == 12
    assert 0 < cache_nbytes(cache)
    with pytest.raises(ValueError, match="'latent'"):
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="'latent'"):
        cache.crop(-1)
