"""CONTRIBUTING.md is right: its examples, added to a copy of the package and to nothing else, do what it says."""

import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from textwrap import dedent

import pytest

REPOSITORY = Path(__file__).parents[1]

CONVERSION = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from conftest import pico_tokenizer
from mha2mla.cli.main import main
from pico import make_source, tokens

folder = Path(sys.argv[1])
make_source("glm").save_pretrained(folder / "source")
pico_tokenizer().save_pretrained(folder / "source")
base = ["convert", str(folder / "source"), str(folder / "output"), "--preset", "paper", "--rope-selection", "ends"]
assert main([*base, "--cache-ratio", "0.125"]) == 0
assert "| RoPE selection | ends |" in (folder / "output" / "README.md").read_text()
kept = AutoModelForCausalLM.from_pretrained(folder / "output").model.layers[0].self_attn.rope_frequencies
assert kept.tolist() == [[0, 1, 2, 3, 28, 29, 30, 31]] * 2, kept
assert main([*base, "--qk-rope-head-dim", "64", "--kv-lora-rank", "48", "--overwrite"]) == 0
with torch.no_grad():
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("source", "output")]
    wanted, got = (model(tokens(2, 20)).logits for model in models)
assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
"""

LOSS = """
import torch
from mha2mla.training import collate_packed, make_losses, use_losses
from pico import make_mla, tokens

model = make_mla().train()
batch = collate_packed([{"input_ids": ids, "lengths": [12]} for ids in tokens(3, 12).tolist()])
plain, logits = model(**batch)[:2]
log_p = logits[:, :-1].log_softmax(-1)
expected = plain + 0.3 * (log_p.exp() * log_p).sum(-1).mean()
use_losses(model, make_losses(entropy_weight=0.3))
loss = model(**batch).loss
torch.testing.assert_close(loss, expected)
loss.backward()
assert model.lm_head.weight.grad.abs().max() > 0
"""

LONG_TASK = """
from mha2mla.evaluation.prompts import fit_length
from mha2mla.evaluation.tasks import LONG_TASKS, TaskData, find_tasks

(task,) = find_tasks(["long:last-word"], TaskData(), 2, (300,))
make = LONG_TASKS["last-word"].make
example = fit_length(make, task.items[0]["seed"], 300, lambda example: len(example.prompt.split()))
assert 290 < len(example.prompt.split()) <= 300 and example.answers[0] in example.prompt
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process that imports a copy of the package with the examples in it."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(str(files("mha2mla")), root / "mha2mla", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)
    for block in map(dedent, blocks):
        path = root / "mha2mla" / block.splitlines()[0].removeprefix("# ")
        assert path.parent.is_dir(), path
        path.write_text(block)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(REPOSITORY / "tests")])}


def run(environment, *arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_architecture_and_rule_convert(environment, tmp_path):
    run(environment, "-c", CONVERSION, tmp_path)


def test_exactness_runs_over_the_new_architecture(environment):
    tests = REPOSITORY / "tests" / "test_exactness.py"
    output = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "glm")
    assert "2 passed" in output


def test_loss_is_minimised(environment):
    run(environment, "-c", LOSS)


def test_long_task_is_found(environment):
    run(environment, "-c", LONG_TASK)
