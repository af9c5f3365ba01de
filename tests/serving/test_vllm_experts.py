"""vLLM serves an export of a mixture of experts, whose router no DeepSeek class of transformers has."""

import pytest
import torch

from engines import Exports, vllm_server
from mha2mla.conversion.export import ExportConfig, export
from mha2mla.conversion.export.check import TEXT
from mha2mla.modeling import MLAMixtralConfig, MLAMixtralForCausalLM
from pico import byte_pair_tokenizer

NEW = 12
FREQUENCIES = [0, 1, 2, 3, 9, 10]


def test_a_mixture_says_what_our_model_says(tmp_path):
    tokenizer = byte_pair_tokenizer()
    config = MLAMixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        kv_lora_rank=40,
        qk_rope_head_dim=2 * len(FREQUENCIES),
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.12,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = MLAMixtralForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.rope_frequencies.copy_(torch.tensor([FREQUENCIES]))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "stock", ExportConfig(pad=512))
    exports = Exports(tmp_path / "stock", {}, model, tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    prompts = [ids[:7], ids[20:60], ids[:300]]
    options = dict(model="model", temperature=0, max_tokens=NEW, min_tokens=NEW, logprobs=1, return_token_ids=True)
    rotary = ("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}')  # as for the dense export
    with vllm_server(exports.folder, tmp_path / "log", *rotary) as server:
        answer = server.post("/v1/completions", prompt=prompts, **options)
    for prompt, choice in zip(prompts, sorted(answer["choices"], key=lambda c: c["index"]), strict=True):
        tokens, logprobs = exports.greedy(prompt, NEW)
        assert choice["token_ids"] == tokens
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-3)
