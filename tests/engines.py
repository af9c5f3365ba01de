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

from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM

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


def random_model(vocab_size: int, frequencies: list[int]) -> MLALlamaForCausalLM:
    """A model whose every part is felt in its output, and whose greedy text does not end by itself."""
    config = MLALlamaConfig(
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
    )
    torch.manual_seed(0)
    model = MLALlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.rope_frequencies.copy_(torch.tensor([frequencies]))
    return model


@dataclass
class Exports:
    """Folder for vLLM (512 + 64), files for llama.cpp, and the stock class of transformers to compare with."""

    folder: Path
    gguf: dict[str, Path]
    reference: Any
    tokenizer: PreTrainedTokenizerFast

    def greedy(self, ids: list[int], new: int) -> tuple[list[int], list[float]]:
        """The tokens that transformers chooses, and their log-probabilities."""
        with torch.no_grad():
            out = self.reference.generate(
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


@dataclass
class Server:
    url: str
    log: Path

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
def llama_server(file: Path, log: Path) -> Iterator[Server]:
    port = free_port()
    command = [SERVE_PYTHON, str(LLAMA_SERVER), str(file), str(port)]
    with running(command, {"PYTHONPATH": ""}, port, log) as server:
        yield server
