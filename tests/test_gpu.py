"""What only a GPU can show: the decode kernel inside `generate`, and the compiled step as a CUDA graph."""

import pytest
import torch
from transformers import StaticCache

from mha2mla.modeling import CACHE_ARGUMENT, latent_module, quantized_cache
from pico import LAYOUTS, make_mla, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=LAYOUTS)
def model(request):
    return make_mla(request.param).cuda().eval()


def generate(model, ids, **kwargs):
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_what_no_cache_gives(model, cache):
    """`static` compiles the step by itself on a GPU (mode reduce-overhead)."""
    ids = tokens(2, 9).cuda()
    expected = generate(model, ids, use_cache=False)
    assert generate(model, ids, cache_implementation=cache).tolist() == expected.tolist()


def test_generate_with_a_static_quantized_cache(model):
    """Within its window it is exact, and it goes on behind that; what rounding does is tested on logits."""
    ids = tokens(2, 9).cuda()
    expected = generate(model, ids, use_cache=False)
    settings = dict(nbits=8, residual_length=16)
    got = generate(model, ids, cache_implementation="static", cache_config=settings)
    assert got.shape == expected.shape
    assert got[:, :18].tolist() == expected[:, :18].tolist()  # the first entry and the 16 newest are exact


def test_the_kernel_does_what_torch_does(model, monkeypatch):
    """Steps behind left padding, with the kernel and without it."""
    model.to(torch.float16)
    ids, mask = tokens(2, 40).cuda(), torch.ones(2, 40, dtype=torch.long, device="cuda")
    mask[1, :7] = 0
    used = []

    def watch(*arguments):
        used.append(can_run(*arguments))
        return used[-1]

    can_run = latent_module.kernel_can_run
    for make in (
        lambda: StaticCache(config=model.config, max_cache_len=64),
        lambda: quantized_cache(model, nbits=8, residual_length=4),
        lambda: quantized_cache(model, nbits=4, residual_length=4, max_cache_len=64),
        lambda: quantized_cache(model, "fp8", residual_length=4, max_cache_len=64),
    ):
        logits = []
        for judge in (watch, lambda *_: False):
            monkeypatch.setattr(latent_module, "kernel_can_run", judge)
            cache, parts = make(), []
            with torch.no_grad():
                for part in (ids[:, :30], *ids[:, 30:].split(1, 1)):
                    seen = int(cache.get_seq_length()) + part.shape[1]
                    parts.append(model(part, attention_mask=mask[:, :seen], **{CACHE_ARGUMENT: cache}).logits[:, -1])
            logits.append(torch.stack(parts))
        torch.testing.assert_close(*logits, rtol=3e-2, atol=5e-2)
    assert used and all(used)


@pytest.mark.parametrize("form", [None, "latent", "fp8"])
def test_a_compiled_step_is_not_compiled_again(model, form):
    """One graph for all lengths; the cache's count of tokens lies on the device."""
    if form is None:
        cache = StaticCache(config=model.config, max_cache_len=64)
    else:
        model.to(torch.bfloat16)  # the kernels are for 16 bits
        cache = quantized_cache(model, form, residual_length=8, max_cache_len=64)
    ids = tokens(2, 9).cuda()
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        for position in range(9, 40):
            at = torch.full((2, 1), position, device="cuda")
            step(tokens(2, 1).cuda(), position_ids=at, **{CACHE_ARGUMENT: cache}).logits.clone()
    assert not torch._dynamo.utils.counters["recompiles"]
