"""llama.cpp serves an exported file over HTTP, with R + r values a token in its cache and nothing else."""

import re

import pytest

from engines import llama_server, random_model
from mha2mla.conversion.export import ExportConfig, export
from mha2mla.conversion.export.check import TEXT
from pico import byte_pair_tokenizer

NEW = 16


@pytest.fixture(scope="module")
def prompts(exports):
    ids = exports.tokenizer(TEXT)["input_ids"]
    return [ids[:1], ids[5:12], ids[:330]]


def test_completions(llama_cpp, exports, prompts):
    dtype, server = llama_cpp
    same = []
    for prompt in prompts:
        answer = server.post("/completion", prompt=prompt, temperature=0, n_predict=NEW, n_probs=1, return_tokens=True)
        tokens, logprobs = exports.greedy(prompt, NEW)
        got = [entry["logprob"] for entry in answer["completion_probabilities"]]
        if dtype == "float32":
            assert answer["tokens"] == tokens
            assert got == pytest.approx(logprobs, abs=1e-3)
        same.append(answer["tokens"][0] == tokens[0] and abs(got[0] - logprobs[0]) < 0.5)
    assert all(same)  # 8 bits: what the format loses, and no more


def test_the_tokenizer_is_the_same(llama_cpp, exports):
    _, server = llama_cpp
    for text in (TEXT, "3.14 is  not   22/7!\n\n\tTrès bien, 你好 <|im_start|>user\nhi<|im_end|>\n"):
        assert server.post("/tokenize", content=text)["tokens"] == exports.tokenizer(text)["input_ids"]


def test_chat_uses_the_template(llama_cpp, exports):
    dtype, server = llama_cpp
    messages = [{"role": "user", "content": "When is the tide?"}]
    ids = exports.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = server.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=NEW)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    if dtype == "float32":
        tokens, _ = exports.greedy(ids, NEW)
        assert answer["choices"][0]["message"]["content"].strip() == exports.tokenizer.decode(tokens).strip()


def test_streaming_gives_the_same(llama_cpp, exports, prompts):
    _, server = llama_cpp
    body = dict(prompt=prompts[1], temperature=0, max_tokens=NEW)
    whole = server.post("/v1/completions", **body)["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in server.events("/v1/completions", **body)) == whole


def test_the_cache_holds_latents_and_one_rotary_key(llama_cpp, exports):
    """40 latents and 22 rotary dims (11 slots, of which 6 are in use), in 3 layers, 4 bytes each."""
    _, server = llama_cpp
    lines = [line for line in server.log.read_text().splitlines() if "llama_kv_cache: size =" in line]
    cells, layers = map(int, re.search(r"\(\s*(\d+) cells,\s*(\d+) layers", lines[-1]).groups())
    keys, values = (float(re.search(rf"{part} \(\w+\):\s*([\d.]+) MiB", lines[-1])[1]) for part in "KV")
    assert (layers, values) == (3, 0.0)
    assert keys == pytest.approx(cells * layers * (40 + 22) * 4 / 2**20, abs=0.01)


def test_a_padded_file_gives_the_same(exports, prompts, tmp_path):
    """Latents of 40 in 64 numbers and 22 rotary dims in 32, which a CPU reads faster."""
    model = exports.gguf["float32"].parent / "model"
    export(model, tmp_path / "padded.gguf", ExportConfig(format="gguf", dtype="float32", pad=64))
    with llama_server(tmp_path / "padded.gguf", tmp_path / "log") as server:
        for prompt in prompts:
            answer = server.post("/completion", prompt=prompt, temperature=0, n_predict=NEW, return_tokens=True)
            assert answer["tokens"] == exports.greedy(prompt, NEW)[0]


def test_sentencepiece(exports, tmp_path):
    """Tokens of Llama 2's kind, whose order of merging llama.cpp takes from scores."""
    tokenizer = byte_pair_tokenizer("sentencepiece")
    random_model(len(tokenizer), [0, 1]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf", ExportConfig(format="gguf"))
    with llama_server(tmp_path / "model.gguf", tmp_path / "log") as server:
        for text in (TEXT, "the tide of the town", "3.14 is  not 22/7! Très bien, 你好"):
            assert server.post("/tokenize", content=text)["tokens"] == tokenizer(text)["input_ids"]
