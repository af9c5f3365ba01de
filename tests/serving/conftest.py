"""Real engines on the loopback: vLLM on the CPU and llama.cpp, each a process of another virtual environment.

`make serve-test` sets it up and names its interpreter in SERVE_PYTHON; without that, nothing here is collected.
"""

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

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mha2mla.conversion.export import ExportConfig, export
from mha2mla.conversion.export.check import TEXT
from mha2mla.modeling import MLALlamaConfig, MLALlamaForCausalLM

SERVE_PYTHON = os.environ.get("SERVE_PYTHON")
if not SERVE_PYTHON:
    collect_ignore_glob = ["test_*"]

HERE = Path(__file__).parent
START_SECONDS = 300
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_pair_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the kind that both engines know, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


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
        initializer_range=0.3,
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


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Exports:
    root = tmp_path_factory.mktemp("serving")
    tokenizer = byte_pair_tokenizer()
    # A run and a second one far behind it: in the folder a table with zero slots, as the kernels have 32.
    model = random_model(len(tokenizer), [0, 1, 2, 3, 9, 10])
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # no special token is ever the likeliest
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    export(root / "model", root / "stock", ExportConfig(pad=512))
    gguf = {}
    for dtype in ("float32", "q8_0"):
        gguf[dtype] = root / f"{dtype}.gguf"
        export(root / "model", gguf[dtype], ExportConfig(format="gguf", dtype=dtype))
    return Exports(root / "stock", gguf, AutoModelForCausalLM.from_pretrained(root / "stock"), tokenizer)


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


@pytest.fixture(scope="session")
def vllm(exports, tmp_path_factory) -> Iterator[Server]:
    port = free_port()
    command = [
        *(str(SERVE_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(exports.folder)),
        *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"),
        # vLLM's own rotary kernel for CPUs is wrong for DeepSeek's queries.
        *("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}'),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",  # the engine does not know us
    }
    with running(command, environment, port, tmp_path_factory.mktemp("vllm") / "log") as server:
        yield server


@pytest.fixture(scope="session", params=["float32", "q8_0"])
def llama_cpp(request, exports, tmp_path_factory) -> Iterator[tuple[str, Server]]:
    port = free_port()
    command = [str(SERVE_PYTHON), str(HERE / "llama_server.py"), str(exports.gguf[request.param]), str(port)]
    with running(command, {"PYTHONPATH": ""}, port, tmp_path_factory.mktemp("llama") / "log") as server:
        yield request.param, server
