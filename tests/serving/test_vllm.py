"""vLLM serves an export over HTTP and says what transformers says, token by token and log-prob by log-prob."""

import pytest

from engines import prompt_logprobs
from mha2mla.conversion.export.check import TEXT

NEW = 16
TOLERANCE = 1e-3  # of a log-probability, fp32 against fp32


@pytest.fixture(scope="module")
def prompts(exports):
    """Of different lengths; the longest reaches over several of the cache's blocks."""
    ids = exports.tokenizer(TEXT)["input_ids"]
    return [ids[:1], ids[5:12], ids[20:60], ids[:330]]


def test_a_batch_of_completions(vllm, exports, prompts):
    choices = vllm.complete(prompts, max_tokens=NEW, logprobs=1)
    for prompt, choice in zip(prompts, choices, strict=True):
        tokens, logprobs = exports.greedy(prompt, NEW)
        assert choice["token_ids"] == tokens
        assert choice["text"] == exports.tokenizer.decode(tokens)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=TOLERANCE)
        assert choice["finish_reason"] == "length"


def test_streaming_gives_the_same(vllm, exports, prompts):
    events = vllm.events("/v1/completions", model="model", prompt=prompts[2], temperature=0, max_tokens=NEW)
    assert len(events) > NEW // 2  # token by token
    tokens, _ = exports.greedy(prompts[2], NEW)
    assert "".join(event["choices"][0]["text"] for event in events) == exports.tokenizer.decode(tokens)


def test_stop_tokens(vllm, exports, prompts):
    tokens, _ = exports.greedy(prompts[1], NEW)
    stop = tokens[5]
    (choice,) = vllm.complete([prompts[1]], max_tokens=NEW, stop_token_ids=[stop])
    assert choice["token_ids"] == tokens[: tokens.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_chat_uses_the_exported_template(vllm, exports):
    messages = [{"role": "user", "content": "When is the tide?"}]
    ids = exports.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = vllm.post(
        "/v1/chat/completions",
        model="model",
        messages=messages,
        temperature=0,
        max_tokens=NEW,
        logprobs=True,
        top_logprobs=1,
    )
    tokens, logprobs = exports.greedy(ids, NEW)
    assert answer["choices"][0]["message"]["content"] == exports.tokenizer.decode(tokens)
    got = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert got == pytest.approx(logprobs, abs=TOLERANCE)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_prompt_logprobs(vllm, exports, prompts):
    """What perplexity is measured by."""
    expected = prompt_logprobs(exports.reference, prompts[3])
    assert vllm.prompt_logprobs(prompts[3]) == pytest.approx(expected, abs=TOLERANCE)


def test_a_cached_prefix_gives_the_same(vllm, exports, prompts):
    def hits() -> float:
        lines = [line for line in vllm.get("/metrics").splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
        return sum(float(line.split()[-1]) for line in lines)

    if "prefix caching to be disabled" in vllm.log.read_text():
        pytest.skip("this vLLM has no prefix caching for latents on a CPU; benchmarks/serving_quality.py asks a GPU")
    longer = prompts[3] + prompts[1]
    vllm.complete([prompts[3]], max_tokens=1)
    before = hits()
    (choice,) = vllm.complete([longer], max_tokens=NEW, logprobs=1)
    assert hits() - before >= 128  # at least a block came from the cache
    tokens, logprobs = exports.greedy(longer, NEW)
    assert choice["token_ids"] == tokens
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=TOLERANCE)
