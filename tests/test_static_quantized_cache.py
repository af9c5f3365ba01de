"""The static quantised cache: what it remembers, the kernel that stores a token, and one graph for all lengths."""

import pytest
import torch

from mha2mla.modeling import (
    CACHE_ARGUMENT,
    LatentStaticLayer,
    LatentStaticQuantizedLayer,
    cache_nbytes,
    latent_module,
    latent_static_quantized_cache,
    quantized_cache,
)
from mha2mla.modeling.latent_quantization import CODE_BITS
from pico import LAYOUTS, make_mla, tokens

NEW = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=LAYOUTS)
def model(request):
    return make_mla(request.param)


def make_layer(form="int8", rank=20, rope=12, size=4, length=40, **settings) -> LatentStaticQuantizedLayer:
    torch.manual_seed(0)
    factors = torch.rand(rank) + 0.5, torch.rand(rope) + 0.5
    return LatentStaticQuantizedLayer(*factors, form=form, residual_length=size, max_cache_len=length, **settings)


@pytest.mark.parametrize("form, q_group_size", [("int4", None), ("int8", None), ("fp8", None), ("int4", 5)])
@pytest.mark.parametrize("chunks", [[30], [1] * 30, [9] + [1] * 21, [3, 1, 12, 1, 1, 7, 5]])
def test_all_but_the_first_and_the_window_is_what_its_codes_stand_for(form, q_group_size, chunks):
    """However the tokens come; before each chunk but the first, the mean is as it was."""
    layer = make_layer(form, q_group_size=q_group_size)
    entries = torch.randn(2, 1, 30, 32)
    expected, mean, count = torch.zeros(2, 1, 0, 32), torch.zeros(2, 1, 1, 12), 0
    for chunk in entries.split(chunks, dim=2):
        layer.append(chunk)
        rotated = layer.rotate(entries[:, :, : count + chunk.shape[2]])
        before, count = count, count + chunk.shape[2]
        if before <= 5 < count:  # the first token leaves the window of four
            mean = rotated[:, :, 1:, 20:].mean(2, keepdim=True)
        full_mean = torch.nn.functional.pad(mean, (20, 0))
        remembered = layer.decode(*layer.encode(rotated - full_mean)) + full_mean
        kept = [0, *range(max(1, count - 4), count)]
        remembered[:, :, kept] = rotated[:, :, kept]
        expected = torch.cat((expected[:, :, : max(0, before - 4)], remembered[:, :, max(0, before - 4) :]), dim=2)
        expected[:, :, kept] = rotated[:, :, kept]
        torch.testing.assert_close(layer.rotate(layer.dequantized()[:, :, :count]), expected, rtol=1e-4, atol=1e-4)
    assert layer.get_seq_length() == 30 and layer.num_packed == 30 - 5


@pytest.mark.parametrize("form", CODE_BITS)
def test_the_kernel_stores_what_torch_stores(monkeypatch, form):
    """From the second token on, until the ring of two has been round twice."""
    pytest.importorskip("triton")
    plain, fast = make_layer(form, size=2), make_layer(form, size=2)
    entries = torch.randn(2, 1, 7, 32).to(DEVICE)
    for layer in (plain, fast):
        layer.append(entries[:, :, :1])
    for position in range(1, 7):
        entry = entries[:, :, position : position + 1]
        monkeypatch.setattr(latent_static_quantized_cache, "store_kernel_can_run", lambda _: False)
        plain.append(entry)
        monkeypatch.setattr(latent_static_quantized_cache, "store_kernel_can_run", lambda _: True)
        fast.append(entry)
        torch.testing.assert_close(fast.window, plain.window)
        torch.testing.assert_close(fast.mean, plain.mean)
        # Behind them is a row that torch's version writes what does not leave to.
        used = int(plain.num_packed)
        numbers = [layer.decode(layer.codes, layer.scales)[:, :used] for layer in (fast, plain)]
        torch.testing.assert_close(*numbers, rtol=1e-3, atol=1e-3)


def generate(model, ids, **kwargs):
    settings = dict(cache_config=dict(nbits=8, residual_length=4), max_new_tokens=NEW, min_new_tokens=NEW) | kwargs
    return model.generate(ids, do_sample=False, cache_implementation="static", **settings)


@pytest.mark.parametrize("mode", [{}, dict(num_beams=3), dict(prefill_chunk_size=4), dict(disable_compile=True)])
@pytest.mark.parametrize("cache_config", [dict(nbits=8, residual_length=4), dict(backend="fp8", residual_length=16)])
def test_generate_gives_the_tokens_of_the_run_without_cache(model, mode, cache_config):
    ids = tokens(2, 12)
    beams = {name: value for name, value in mode.items() if name == "num_beams"}
    expected = model.generate(ids, use_cache=False, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **beams)
    assert generate(model, ids, cache_config=cache_config, **mode).tolist() == expected.tolist()


def test_generate_makes_a_static_cache_of_codes_and_a_second_one_no_smaller(model):
    for new, length in ((30, 48), (10, 48)):
        made = generate(model, tokens(2, 12), max_new_tokens=new, min_new_tokens=new, return_dict_in_generate=True)
        layer = made.past_key_values.layers[0]
        assert type(layer) is LatentStaticQuantizedLayer and layer.max_cache_len == length
    made = generate(model, tokens(2, 12), cache_config=None, return_dict_in_generate=True)
    assert type(made.past_key_values.layers[0]) is LatentStaticLayer


@pytest.mark.parametrize("nbits", [4, 8])
def test_steps_are_those_of_the_dynamic_cache(monkeypatch, model, nbits):
    """Logits after every token, behind left padding. The windows differ in length, so by little."""
    monkeypatch.setattr("mha2mla.modeling.latent_quantized_cache.MEAN_TOKENS", 8)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0

    def logits(cache) -> torch.Tensor:
        steps = []
        with torch.no_grad():
            for start, end in ((0, 16), *((i, i + 1) for i in range(16, 40))):
                out = model(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE_ARGUMENT: cache})
                steps.append(out.logits[:, -1])
        return torch.stack(steps)

    dynamic = logits(quantized_cache(model, nbits=nbits, residual_length=4))
    static = logits(quantized_cache(model, nbits=nbits, residual_length=4, max_cache_len=40))
    assert (static - dynamic).norm() < (0.1 if nbits == 4 else 0.01) * dynamic.norm()


@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_compiled_step_is_one_graph(monkeypatch, by_kernel):
    """For all lengths, whether the window is full or not; the kernels are nodes of it."""
    torch._dynamo.reset()
    model = make_mla("shared").to(DEVICE)
    if by_kernel:
        pytest.importorskip("triton")
    monkeypatch.setattr(latent_module, "kernel_can_run", lambda *_: by_kernel)
    monkeypatch.setattr(latent_static_quantized_cache, "store_kernel_can_run", lambda _: by_kernel)
    ids, graphs = tokens(1, 8).to(DEVICE), []
    cache = quantized_cache(model, nbits=8, residual_length=3, max_cache_len=8)
    with torch.no_grad():
        model(ids[:, :3], **{CACHE_ARGUMENT: cache})
        compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
        for i in range(3, 8):
            position = torch.full((1, 1), i, device=DEVICE)
            got = compiled(ids[:, i : i + 1], position_ids=position, **{CACHE_ARGUMENT: cache}).logits
        expected = model(ids, use_cache=False).logits[:, -1:]
    assert len(graphs) == 1
    for name in ("decode_attention", "store_entry"):
        assert sum(f"mha2mla.{name}" in str(node.target) for node in graphs[0].graph.nodes) == 2 * by_kernel
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert cache.layers[0].num_packed == 8 - 4


def test_rows_are_chosen_and_a_reset_forgets(model):
    ids = tokens(3, 14)
    cache = quantized_cache(model, nbits=8, residual_length=4, max_cache_len=24)
    with torch.no_grad():
        model(ids[:, :10], **{CACHE_ARGUMENT: cache})
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)  # rows 2, 2, 0, 0
        window = cache.layers[0].window
        cache.reorder_cache(torch.tensor([3, 3, 0, 1]))  # rows 0, 0, 2, 2
        assert cache.layers[0].window is window
        rows = ids[[0, 0, 2, 2]]
        got = model(rows[:, 10:11], **{CACHE_ARGUMENT: cache}).logits
        torch.testing.assert_close(got, model(rows[:, :11], use_cache=False).logits[:, 10:], rtol=0.1, atol=0.1)
        cache.reset()
        again = model(rows[:, :9], **{CACHE_ARGUMENT: cache}).logits
    torch.testing.assert_close(again, model(rows[:, :9], use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_all_tokens(model):
    cache = quantized_cache(model.bfloat16(), nbits=4, residual_length=4, max_cache_len=24)
    with torch.no_grad():
        model(tokens(3, 5), **{CACHE_ARGUMENT: cache})
    rank, rope = cache.layers[0].sizes
    packed, full = 2 * -(-rank // 4) + 2 * -(-rope // 4) + 4, 2 * (rank + rope)
    assert cache_nbytes(cache) == len(cache.layers) * 3 * (23 * packed + 5 * full + 2 * rope)


def test_what_it_cannot_do_is_said_in_a_sentence():
    layer = make_layer()
    with pytest.raises(ValueError, match="cannot forget tokens"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="cannot be offloaded"):
        layer.offload()
    with pytest.raises(ValueError, match="latent attention caches one entry"):
        layer.append(torch.zeros(1, 2, 3, 32))
