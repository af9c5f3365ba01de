"""vLLM serves our own checkpoints by the plugin and says what transformers says, token by token and log-prob by
log-prob: what the stock DeepSeek form cannot say. (Prompts in chunks are for GPUs: vLLM reads whole ones on a CPU.)"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engines import Server, greedy, prompt_logprobs, random_model, vllm_server
from mha2mla.conversion.export.check import TEXT
from mha2mla.modeling import MLAMixtralForCausalLM, MLAOlmo2ForCausalLM, MLAQwen3ForCausalLM, MLAQwen3MoeForCausalLM
from pico import byte_pair_tokenizer

NEW = 16
TOLERANCE = 1e-3  # of a log-probability, fp32 against fp32
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# Each with other rotary frequencies in every layer.
MODELS: dict[str, dict] = {
    "qwen2": dict(attention_bias=True, tie_word_embeddings=True),
    "qwen3": dict(family=MLAQwen3ForCausalLM),
    "olmo2": dict(family=MLAOlmo2ForCausalLM, num_nope_key_heads=2),
    "mixtral": dict(family=MLAMixtralForCausalLM, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(family=MLAQwen3MoeForCausalLM, **EXPERTS, mlp_only_layers=[0], norm_topk_prob=True),
}
OPTIONS = {"olmo2": ("--tensor-parallel-size", "2")}


@dataclass
class Served:
    model: Any  # in transformers
    server: Server
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=MODELS)
def served(request, site, tmp_path_factory) -> Iterator[Served]:
    root, tokenizer = tmp_path_factory.mktemp("served"), byte_pair_tokenizer()
    model = random_model(len(tokenizer), [0, 1, 2, 3, 9, 10], **MODELS[request.param])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.rope_frequencies.copy_(torch.tensor([[index, 1, 2, 5 + index, 9, 9]]))
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    ids = tokenizer(TEXT)["input_ids"]
    # Of different lengths; the longest reaches over several of the cache's blocks.
    prompts = [ids[:1], ids[5:12], ids[20:60], ids[:330]]
    options = OPTIONS.get(request.param, ())
    with vllm_server(root / "model", root / "log", *options, PYTHONPATH=str(site)) as server:
        yield Served(model, server, prompts)


def test_a_batch_of_completions(served):
    choices = served.server.complete(served.prompts, max_tokens=NEW, min_tokens=NEW, logprobs=1)
    for prompt, choice in zip(served.prompts, choices, strict=True):
        tokens, logprobs = greedy(served.model, prompt, NEW)
        assert choice["token_ids"] == tokens
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=TOLERANCE)


def test_prompt_logprobs(served):
    ids = served.prompts[3]
    assert served.server.prompt_logprobs(ids) == pytest.approx(prompt_logprobs(served.model, ids), abs=TOLERANCE)
