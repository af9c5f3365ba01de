"""Servers of real engines, each a process of another virtual environment, and what they are compared with."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from mha2mla.modeling import MLALlamaForCausalLM

SERVE_PYTHON = os.environ.get("SERVE_PYTHON", "")  # of the engines' environment; `make serve-test` sets it
LLAMA_SERVER = Path(__file__).parent / "serving" / "llama_server.py"
START_SECONDS = 300
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",  # the engine does not know us
}


def random_model(vocab_size: int, frequencies: list[int], family: Any = MLALlamaForCausalLM, **fields) -> Any:
    """A model of ours whose every part is felt in its output. `fields` are of its config."""
    config = family.config_class(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        kv_lora_rank=40,
        qk_rope_head_dim=2 * len(frequencies),
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.15,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    torch.manual_seed(0)
    model = family(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "_norm" in name:  # of queries and keys
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for layer in model.model.layers:
        layer.self_attn.rope_frequencies.copy_(torch.tensor([frequencies]))
    return model


@torch.no_grad()
def greedy(model: Any, ids: list[int], new: int) -> tuple[list[int], list[float]]:
    """The tokens that transformers chooses, and their log-probabilities."""
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = out.sequences[0, len(ids) :].tolist()
    rows = [logits[0].log_softmax(-1) for logits in out.logits]
    return chosen, [row[token].item() for row, token in zip(rows, chosen, strict=True)]


@torch.no_grad()
def prompt_logprobs(model: Any, ids: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first."""
    rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(ids[1:])]


@dataclass
class Exports:
    """Folder for vLLM (512 + 64), files for llama.cpp, and the stock class of transformers to compare with."""

    folder: Path
    gguf: dict[str, Path]
    reference: Any
    tokenizer: PreTrainedTokenizerFast

    def greedy(self, ids: list[int], new: int) -> tuple[list[int], list[float]]:
        return greedy(self.reference, ids, new)


@dataclass
class Server:
    url: str
    log: Path

    def complete(self, prompts: list[list[int]], **options) -> list[dict]:
        """vLLM's answer to each."""
        body = dict(model="model", prompt=prompts, temperature=0, return_token_ids=True, **options)
        return sorted(self.post("/v1/completions", **body)["choices"], key=lambda choice: choice["index"])

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        """vLLM's log-probabilities of all tokens but the first: what perplexity is measured by."""
        (choice,) = self.complete([ids], max_tokens=1, prompt_logprobs=0)
        entries = zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
        return [entry[str(token)]["logprob"] for entry, token in entries]

    def get(self, path: str) -> str:
        return urllib.request.urlopen(self.url + path, timeout=60).read().decode()

    def post(self, path: str, **body) -> dict:
        return json.loads(self.stream(path, **body).read())

    def stream(self, path: str, **body):
        """The response as it comes."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=300)

    def events(self, path: str, **body) -> list[dict]:
        """Server-sent events of a streamed answer."""
        lines = self.stream(path, **body, stream=True).read().decode().splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


@contextmanager
def running(command: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[Server]:
    """A server until the block ends; its own process, ended by its number."""
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=out, stderr=out)
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        for _ in range(START_SECONDS):
            if process.poll() is not None:
                raise RuntimeError(f"{command[:3]} ended:\n{log.read_text()[-4000:]}")
            try:
                server.get("/health")
                break
            except OSError:
                time.sleep(1)
        else:
            raise RuntimeError(f"{command[:3]} did not start:\n{log.read_text()[-4000:]}")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def vllm_server(folder: Path, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    port = free_port()
    command = [
        *(SERVE_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager", *options),
    ]
    with running(command, VLLM_ENVIRONMENT | environment, port, log) as server:
        yield server


@contextmanager
def llama_server(file: Path, log: Path) -> Iterator[Server]:
    port = free_port()
    command = [SERVE_PYTHON, str(LLAMA_SERVER), str(file), str(port)]
    with running(command, {"PYTHONPATH": ""}, port, log) as server:
        yield server
