"""What the pages do with names on the Hub, against a stand-in of its HTTP interface on this machine."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hub import run_hub
from pico import BLOCK_PACKAGE

COMMANDS = """
import json, sys
from mha2mla.cli.main import main
for command in json.loads(sys.argv[1]):
    status = main(command)
    assert status == 0, (status, command)
"""
IDS = [[5, 6, 7]]
LOAD = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/mla", trust_remote_code=True)
AutoTokenizer.from_pretrained("me/mla", trust_remote_code=True)
import torch
print(type(model).__name__, model(torch.tensor({IDS})).logits.sum().item())
"""


@pytest.fixture
def hub(save_source, calibration_file, tmp_path):
    """The Hub with a model `me/llama` and a data set `me/texts`."""
    data = tmp_path / "texts"
    data.mkdir()
    calibration_file.rename(data / "train.jsonl")
    with run_hub() as hub:
        hub.add("models/me/llama", save_source("gqa"))
        hub.add("datasets/me/texts", data)
        yield hub


def run(hub, work, program, *argv, **changes):
    """In a process of its own: huggingface_hub reads the endpoint when it is imported."""
    environment = (
        os.environ
        | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(work / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_stand_in",
            "HF_HUB_DISABLE_XET": "1",
        }
        | changes
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, env=environment, cwd=work
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_that_cannot_be_reached_is_told_in_a_line(tmp_path):
    """Nothing listens at the address; the libraries' own retries take half a minute."""
    program = (
        "import sys\nfrom mha2mla.cli.main import main\nfrom mha2mla.common import hub\n"
        "hub.PAUSES = (0.1,)\nsys.exit(main(['plan', 'some/model']))\n"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=25)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "mha2mla plan: error: source: some/model cannot be downloaded: the Hub is out of reach (" in done.stderr


READ = """
from mha2mla.common import hub
from mha2mla.common.text_sources import TextError, TextSource, load_source
hub.PAUSES = (0.1,)
for name in ("me/texts", "me/none"):
    for streaming in (False, True):
        try:
            print(next(iter(load_source(TextSource(name), streaming)))["text"][:1])
        except TextError as error:
            print(error)
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_data_set_that_was_downloaded_needs_no_hub(offline, hub, tmp_path):
    download = "from datasets import load_dataset\nload_dataset('me/texts')"
    run(hub, tmp_path, download)
    hub.server_close()
    printed = run(hub, tmp_path, READ, HF_HUB_OFFLINE=offline, HF_ENDPOINT="http://127.0.0.1:9").splitlines()
    assert printed[:2] == ["w", "w"]
    assert len(printed) == 4 and all("me/none " in line for line in printed[2:])


def test_from_the_hub_and_back(hub, tmp_path):
    sizes = ["--cache-ratio", "0.5", "--samples", "4", "--length", "8", "--refine-steps", "0"]
    steps = ["--max_steps", "1", "--length", "8", "--use_cpu", "--save_strategy", "no", "--streaming"]
    commands = [
        ["plan", "me/llama"],
        ["convert", "me/llama", "mla", "--data", "me/texts", *sizes],
        ["train", "--model", "mla", "--teacher", "me/llama", "--data", "me/texts", *steps, "--output", "recovered"],
        ["push", "recovered", "me/mla"],
        ["eval", "me/llama", "me/mla", "--data", "me/texts", "--limit", "2", "--length", "16", "--trust-remote-code"],
        ["export", "me/mla", "served"],
    ]
    shown = run(hub, tmp_path, COMMANDS, json.dumps(commands))
    assert f"{hub.endpoint}/me/mla/commit/" in shown and len(hub.commits) == 1
    name, total = run(hub, tmp_path, BLOCK_PACKAGE + LOAD).split()
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")(torch.tensor(IDS)).logits.sum().item()
    assert name == "MLALlamaForCausalLM" and float(total) == pytest.approx(here, rel=1e-5)
