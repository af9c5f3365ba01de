"""Real engines on the loopback: vLLM on the CPU and llama.cpp, each a process of another virtual environment.

`make serve-test` sets it up and names its interpreter in SERVE_PYTHON; without that, nothing here is collected.
"""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mha2mla
from engines import SERVE_PYTHON, Exports, Server, llama_server, random_model, vllm_server
from mha2mla.conversion.export import ExportConfig, export
from pico import byte_pair_tokenizer

if not SERVE_PYTHON:
    collect_ignore_glob = ["test_*"]


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Exports:
    root = tmp_path_factory.mktemp("serving")
    tokenizer = byte_pair_tokenizer()
    # A run and a second one far behind it: in the folder a table with zero slots, as the kernels have 32.
    model = random_model(len(tokenizer), [0, 1, 2, 3, 9, 10])
    with torch.no_grad():
        for token in range(len(tokenizer)):  # greedy text is whole characters, and does not end by itself
            if token < 3 or "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token]):
                model.lm_head.weight[token] = 0
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    export(root / "model", root / "stock", ExportConfig(pad=512))
    gguf = {}
    for dtype in ("float32", "q8_0"):
        gguf[dtype] = root / f"{dtype}.gguf"
        export(root / "model", gguf[dtype], ExportConfig(format="gguf", dtype=dtype))
    return Exports(root / "stock", gguf, AutoModelForCausalLM.from_pretrained(root / "stock"), tokenizer)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A folder with nothing but this package as it is installed, entry points included."""
    folder = tmp_path_factory.mktemp("site")
    installed = metadata.distribution("mha2mla")
    (entry_points,) = (file for file in installed.files or () if file.name == "entry_points.txt")
    info = Path(str(installed.locate_file(entry_points))).parent
    for path in (Path(mha2mla.__file__).parent, info):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def vllm(exports, tmp_path_factory) -> Iterator[Server]:
    # vLLM's own rotary kernel for CPUs is wrong for DeepSeek's queries.
    options = ("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}')
    with vllm_server(exports.folder, tmp_path_factory.mktemp("vllm") / "log", *options) as server:
        yield server


@pytest.fixture(scope="session", params=["float32", "q8_0"])
def llama_cpp(request, exports, tmp_path_factory) -> Iterator[tuple[str, Server]]:
    with llama_server(exports.gguf[request.param], tmp_path_factory.mktemp("llama") / "log") as server:
        yield request.param, server
