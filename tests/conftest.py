import os

os.environ["HF_HUB_OFFLINE"] = "1"  # every test is offline; a forgotten download fails at once
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# One thread, here and in the processes that tests start: pico models are faster so, two test workers share two cores,
# and what two processes compute is then the same to the last bit.
os.environ["OMP_NUM_THREADS"] = "1"

import socket
import subprocess
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the import of the model family defines the decode kernel

from pico import VOCAB, make_source


def pico_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


@pytest.fixture
def save_source(tmp_path):
    """Save a pico source model with its tokenizer; gives the folder."""

    def save(kind="gqa", rope="default", dtype=torch.float32, **save_kwargs):
        folder = tmp_path / f"source-{kind}-{rope}"
        make_source(kind, rope).to(dtype).save_pretrained(folder, **save_kwargs)
        pico_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def calibration_file(tmp_path):
    """A jsonl of documents that the pico tokenizer knows."""
    generator = torch.Generator().manual_seed(0)
    lines = [
        '{"text": "' + " ".join(f"w{i}" for i in torch.randint(4, VOCAB, (50,), generator=generator).tolist()) + '"}'
        for _ in range(20)
    ]
    path = tmp_path / "calibration.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def launch(command: Callable[[str], list], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run what starts several processes, given a port for them to meet at. A port that was free may be taken by the
    time it is bound, so that one is tried again with another."""
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        done = subprocess.run(list(map(str, command(port))), env=environment, capture_output=True, text=True)
        if "address already in use" not in done.stderr.lower():
            break
    return done
