"""Every way to generate gives the tokens of the run without a cache, from a cache of the promised size."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mha2mla.modeling import CACHE_ARGUMENT, GrowingBuffer, LatentDynamicLayer, LatentStaticLayer, cache_nbytes
from pico import FORMS, make_mla, tokens

NEW = 10


@pytest.fixture(params=FORMS)
def model(request):
    return make_mla(request.param)


def generate(model, ids, **kwargs):
    kwargs = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) | kwargs
    return model.generate(ids, **kwargs)


MODES = {
    "default": {},
    "dynamic": dict(cache_implementation="dynamic"),
    "static": dict(cache_implementation="static", disable_compile=True),
    "chunked-prefill": dict(prefill_chunk_size=4),
    "static-chunked-prefill": dict(cache_implementation="static", prefill_chunk_size=4, disable_compile=True),
    "beam": dict(num_beams=3),
    "static-beam": dict(num_beams=3, cache_implementation="static", disable_compile=True),
    "beam-return-sequences": dict(num_beams=4, num_return_sequences=2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_modes_give_the_tokens_of_the_run_without_cache(model, mode, implementation):
    model.set_attn_implementation(implementation)
    ids = tokens(2, 9)
    beams = {k: v for k, v in MODES[mode].items() if k.startswith("num_")}
    expected = generate(model, ids, use_cache=False, **beams)
    assert generate(model, ids, **MODES[mode]).tolist() == expected.tolist()


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_prompts(model, length):
    ids = tokens(2, length)
    expected = generate(model, ids, use_cache=False).tolist()
    assert generate(model, ids).tolist() == expected
    assert generate(model, ids, cache_implementation="static", disable_compile=True).tolist() == expected


def test_left_padding(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ids[0, :4] = 0
    alone = generate(model, ids[:1, 4:])
    for kwargs in ({}, dict(cache_implementation="static", disable_compile=True), dict(use_cache=False)):
        both = generate(model, ids, attention_mask=mask, **kwargs)
        assert both[0, 9:].tolist() == alone[0, 5:].tolist()


def test_assisted_decoding_and_prompt_lookup(model):
    """Both crop the cache back to the accepted tokens."""
    ids = tokens(1, 4).repeat(1, 3)  # repetition gives prompt lookup something to find
    expected = generate(model, ids, use_cache=False)
    assert generate(model, ids, prompt_lookup_num_tokens=3).tolist() == expected.tolist()
    assistant = make_mla("shared", seed=1)
    assert generate(model, ids, assistant_model=assistant).tolist() == expected.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs CUDA streams")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloading(model, implementation):
    model.cuda()
    ids = tokens(2, 9).cuda()
    expected = generate(model, ids, use_cache=False)
    assert generate(model, ids, cache_implementation=implementation).tolist() == expected.tolist()


def test_layers_move_between_devices_as_one_buffer(model):
    """What offloading does to a layer, on the meta device: `values` stays a view of what was moved."""
    cache = DynamicCache(config=model.config)
    model(tokens(1, 5), **{CACHE_ARGUMENT: cache})
    layer = cache.layers[0]
    before = layer.keys.clone()
    layer.offload()
    layer.prefetch()
    assert layer.values.data_ptr() == layer.keys.data_ptr()
    torch.testing.assert_close(layer.keys, before)


def test_batch_select_repeat_reorder_crop_and_reset(model):
    ids = tokens(3, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
        cache.crop(-2)
        assert cache.get_seq_length() == 6
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)  # rows 2, 2, 0, 0
        cache.reorder_cache(torch.tensor([3, 0]))  # rows 0, 2
        rows = ids[[0, 2]]
        got = model(rows[:, 6:], **{CACHE_ARGUMENT: cache}).logits
        expected = model(rows, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, **{CACHE_ARGUMENT: cache}).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_size_is_exactly_latents_and_rotary_keys(model, dtype):
    model.to(dtype)
    config = model.config
    width = config.kv_lora_rank + config.num_rope_key_heads * config.qk_rope_head_dim
    out = generate(model, tokens(3, 9), return_dict_in_generate=True).past_key_values
    assert type(out) is DynamicCache and type(out.layers[0]) is LatentDynamicLayer
    cached = 9 + NEW - 1  # the last token is never fed back
    assert cache_nbytes(out) == config.num_hidden_layers * cached * 3 * width * dtype.itemsize
    for layer in out.layers:  # and nothing hides behind the views but the room for the next tokens
        assert layer.keys.untyped_storage().nbytes() == layer.allocated_nbytes
        assert layer.allocated_nbytes - layer.nbytes <= GrowingBuffer.MIN_ROOM * 3 * width * dtype.itemsize
        assert layer.values.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()

    static = StaticCache(config=config, max_cache_len=20)
    with torch.no_grad():
        model(tokens(3, 9), **{CACHE_ARGUMENT: static})
    assert type(static.layers[0]) is LatentStaticLayer
    assert cache_nbytes(static) == config.num_hidden_layers * 24 * 3 * width * dtype.itemsize  # 20, rounded up


def test_static_decode_is_one_graph_without_recompiles(model):
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        pytest.skip("transformers loops over the experts that were chosen")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    ids = tokens(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=16)
    got = []
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        step = tokens(2, 4, seed=1)
        for i in range(4):
            position = torch.full((2, 1), 6 + i)
            got.append(compiled(step[:, i : i + 1], **{CACHE_ARGUMENT: cache}, position_ids=position).logits)
        expected = model(torch.cat((ids, step), dim=1), use_cache=False).logits[:, 6:]
    assert len(graphs) == 1
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_can_stand_for_the_prompt(form):
    """Soft prompts, and models that see."""
    model, ids = make_mla(form), tokens(2, 6)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **options)[:, 6:]
    embedded = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embedded, **options).equal(expected)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "quantized"}], ids=["dynamic", "quantized"])
def test_a_growing_cache_has_no_graph_break(cache):
    torch._dynamo.reset()
    model, ids = make_mla("shared"), tokens(2, 6)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **cache)
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert model.generate(ids, **options).equal(expected)


def test_a_compiled_step_goes_on_from_inference_mode():
    model, ids = make_mla("shared"), tokens(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        cache = getattr(model(ids), CACHE_ARGUMENT)
    with torch.no_grad():
        got = compiled(ids[:, :1], **{CACHE_ARGUMENT: cache}).logits[:, 0]
        expected = model(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("codes", ({"nbits": 8}, {"backend": "fp8"}), ids=str)
def test_static_codes_under_autocast(codes):
    """All is in the window, so that the tokens are those of a static cache of numbers."""
    model, ids = make_mla("shared"), tokens(1, 6)
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, cache_implementation="static")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.generate(ids, **options)
        assert model.generate(ids, **options, cache_config=codes).equal(expected)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_to_the_other_16_bits(form):
    """float16, `torch.autocast`'s default, around a model in bfloat16."""
    if form in ("mla_mixtral", "mla_qwen3_moe"):
        pytest.skip("transformers' experts want one type")
    model, ids = make_mla(form).to(torch.bfloat16), tokens(1, 6)
    with torch.no_grad():
        expected = model(ids).logits.float()
        with torch.autocast("cpu", dtype=torch.float16):
            error = model(ids).logits.float() - expected
    assert error.norm() < 0.03 * expected.norm()


def test_continuous_batching_is_refused_with_what_to_do_instead(model):
    """Its cache has pages of keys and values."""
    message = (
        f"model_type='{model.config.model_type}': continuous batching .* generate\\(\\) as one padded batch, or serve"
    )
    for start in (
        lambda: model.generate_batch(tokens(2, 4).tolist(), model.generation_config),
        lambda: model.generate(tokens(2, 4), cache_implementation="paged", max_new_tokens=2),
        model.init_continuous_batching,
    ):
        with pytest.raises(ValueError, match=message):
            start()
