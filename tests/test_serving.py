"""What of the vLLM plugin needs no vLLM: weights padded to the sizes of kernels, and rotary frequencies of a layer."""

import ast
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import mha2mla.serving
from mha2mla.conversion.summary import PLUGIN, serve_as_it_is
from mha2mla.modeling import FAMILIES, MLALlamaConfig, MLALlamaForCausalLM, MLAQwen3Config
from mha2mla.modeling.latent_attention import rotary_table, rotate, select_frequencies
from mha2mla.serving import register
from mha2mla.serving.padding import (
    grow,
    pad_entries,
    pad_headwise_queries,
    pad_output,
    pad_queries,
    pad_up_projection,
    spread_pairs,
)
from mha2mla.serving.rotary import LayerRotary
from mha2mla.serving.sizes import kernel_shape, use_kernel_sizes, wanted_ranks
from pico import ROPES

SIZES = dict(
    vocab_size=32,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    kv_lora_rank=10,
    qk_rope_head_dim=6,
    qk_nope_head_dim=8,
    v_head_dim=12,
    initializer_range=0.3,
)


@pytest.mark.parametrize("num_nope_key_heads", [2, 4])
def test_padded_weights_are_the_same_attention(num_nope_key_heads):
    torch.manual_seed(0)
    fields = SIZES | dict(num_nope_key_heads=num_nope_key_heads, attention_bias=True)
    model = MLALlamaForCausalLM(MLALlamaConfig(**fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    config = MLALlamaConfig(**fields)
    use_kernel_sizes(config, (16,))
    shape, target = model.config.latent_shape, config.latent_shape
    assert (target.width, target.qk_nope_head_dim, target.v_head_dim) == (16 + 64, 128, 128)

    weights, prefix = model.state_dict(), "model.layers.0.self_attn."
    pads = {
        "q_proj.weight": pad_queries,
        "q_proj.bias": pad_queries,
        "kv_a_proj.weight": pad_entries,
        "kv_a_proj.bias": pad_entries,
        "kv_b_proj.weight": pad_up_projection,
        "o_proj.weight": pad_output,
    }
    for name, pad in pads.items():
        weights[prefix + name] = pad(weights[prefix + name], shape, target)
    # vLLM's order is head by head, and ours all keys before all values.
    heads = weights[prefix + "kv_b_proj.weight"].unflatten(0, (4, 256))
    weights[prefix + "kv_b_proj.weight"] = torch.cat((heads[:, :128].flatten(0, 1), heads[:, 128:].flatten(0, 1)))
    # What the slots behind turn is zero.
    weights[prefix + "rope_frequencies"] = grow(weights[prefix + "rope_frequencies"], 32, 1)
    config.num_key_value_heads = config.num_attention_heads  # a value for each query head
    padded = MLALlamaForCausalLM(config).eval()
    padded.load_state_dict(weights)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(padded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_matrix_for_each_head_is_padded_as_one():
    shape = MLALlamaConfig(**SIZES).latent_shape
    target = kernel_shape(MLALlamaConfig(**SIZES), (16,))
    weight = torch.randn(4, 8 + 6, 12)
    padded = pad_headwise_queries(weight, shape, target)
    assert padded.shape == (4, 128 + 64, 12)
    torch.testing.assert_close(padded.flatten(0, 1), pad_queries(weight.flatten(0, 1), shape, target))


def test_pairs_stay_pairs():
    assert spread_pairs(torch.arange(1, 7), 10, 0).tolist() == [1, 2, 3, 0, 0, 4, 5, 6, 0, 0]


def test_sizes():
    config = MLALlamaConfig(**SIZES)
    assert kernel_shape(config, (256, 512)).kv_lora_rank == 256
    use_kernel_sizes(config, (512,))
    own = config.checkpoint_sizes
    use_kernel_sizes(config, (512,))  # vLLM may ask again
    assert config.checkpoint_sizes == own == asdict(MLALlamaConfig(**SIZES).latent_shape)
    assert (config.latent_cache_dim, config.qk_head_dim) == (576, 192)
    assert config.to_json_string()  # by which vLLM tells configs apart


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_rope_key_heads=2),
        dict(kv_lora_rank=513),
        dict(qk_rope_head_dim=66),
        dict(qk_nope_head_dim=129),
        dict(v_head_dim=129),
        dict(quantization_config={"quant_method": "fp8"}),
    ],
)
def test_what_does_not_fit_is_refused(fields):
    (field,) = fields
    with pytest.raises(ValueError, match="quantised" if field == "quantization_config" else f"{field}="):
        kernel_shape(MLAQwen3Config(**SIZES | fields), (256, 512))


def test_a_rank_that_is_asked_for_is_one_of_the_kernels():
    config = MLALlamaConfig(**SIZES)
    assert wanted_ranks(config, (256, 512)) == (256, 512)
    config.kernel_kv_lora_rank = 512
    assert wanted_ranks(config, (256, 512)) == (512,)
    for wrong, ranks in ((300, (256, 512)), ("512", (256, 512)), (256, (512,))):
        config.kernel_kv_lora_rank = wrong
        with pytest.raises(ValueError, match=f"kernel_kv_lora_rank={wrong!r} must be one of .*512 here"):
            wanted_ranks(config, ranks)


def test_an_mlp_without_gate_is_refused():
    with pytest.raises(ValueError, match="gated_mlp=False"):
        kernel_shape(MLALlamaConfig(**SIZES, gated_mlp=False), (256, 512))


@pytest.mark.parametrize(
    "fields, command",
    [
        ({}, "vllm serve out"),
        (dict(rope_parameters=ROPES["dynamic"]), "vllm serve out --max-model-len 32"),
        (dict(rope_parameters=ROPES["longrope"]), "vllm serve out --max-model-len 16"),
        (dict(gated_mlp=False), None),
        (dict(qk_rope_head_dim=96, head_dim=128), None),
        (dict(num_rope_key_heads=2), None),
        (dict(kv_lora_rank=513), None),
    ],
)
def test_a_conversion_ends_with_a_command_that_the_plugin_takes(fields, command):
    config = MLALlamaConfig(**SIZES | dict(max_position_embeddings=32) | fields)
    shown = [] if command is None else [command + PLUGIN]
    assert serve_as_it_is(Path("out"), config) == shown


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_of_a_layer(rope):
    config = MLALlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=ROPES[rope])
    chosen = torch.tensor([[5, 0, 2]])
    rotary = LayerRotary(config, config.latent_shape, num_pairs=8, max_model_len=16)
    rotary.choose(chosen)
    x, positions = torch.randn(10, 4, 6), torch.arange(3, 13)
    turned = rotary(positions, spread_pairs(x, 16, -1))

    tables = LlamaRotaryEmbedding(config)(x, positions[None])
    expected = rotate(x.transpose(0, 1)[None], *select_frequencies(rotary_table(*tables), chosen))[0].transpose(0, 1)
    torch.testing.assert_close(turned, spread_pairs(expected, 16, -1))


@pytest.mark.parametrize(("rope", "limit"), [("dynamic", 32), ("longrope", 16)])
def test_other_frequencies_for_long_texts_are_refused(rope, limit):
    config = MLALlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=ROPES[rope])
    LayerRotary(config, config.latent_shape, num_pairs=8, max_model_len=limit)
    with pytest.raises(ValueError, match=f"--max-model-len {limit}"):
        LayerRotary(config, config.latent_shape, num_pairs=8, max_model_len=limit + 1)


def test_a_strange_vllm_is_left_alone(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "cannot serve" in caplog.text


def test_every_family_has_a_model():
    code = ast.parse(Path(mha2mla.serving.__file__).with_name("models.py").read_text(encoding="utf-8"))
    classes = {node.name for node in code.body if isinstance(node, ast.ClassDef)}
    assert {model.__name__ for model in FAMILIES.values()} <= classes
