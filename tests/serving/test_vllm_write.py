"""`mha2mla write`: vLLM on the CPU writes the text that `mha2mla train` reads. (A random model ends no question.)"""

import json
import os
import subprocess

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engines import SERVE_PYTHON, VLLM_ENVIRONMENT
from mha2mla.common.text_sources import TextSource, check_source
from pico import byte_pair_tokenizer

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, head_dim=32)


def test_texts_of_a_model(site, tmp_path):
    tokenizer = byte_pair_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SIZES)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "own.jsonl"
    command = [SERVE_PYTHON, "-m", "mha2mla.cli.main", "write", str(tmp_path / "model"), str(output)]
    environment = os.environ | VLLM_ENVIRONMENT | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [*command, "--tokens", "600", "--length", "12", "--chats", "0"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert f"Wrote {len(texts)} texts to " in done.stdout and len(texts) > 40
    assert all(text.startswith(("How", "What", "The", "Steps", "Tips", "Why", "You", "To")) for text in texts)
    assert check_source(TextSource(str(output)), tokenizer).name == "text"
