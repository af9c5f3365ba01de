"""Sequence and token classification and question answering: transformers' heads on the family's decoder."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from mha2mla.modeling import (
    MLALlamaForQuestionAnswering,
    MLALlamaForSequenceClassification,
    MLALlamaForTokenClassification,
)
from pico import BLOCK_PACKAGE, make_mla, tokens

HEADS = {
    AutoModelForQuestionAnswering: MLALlamaForQuestionAnswering,
    AutoModelForSequenceClassification: MLALlamaForSequenceClassification,
    AutoModelForTokenClassification: MLALlamaForTokenClassification,
}


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_heads_load_a_language_model_and_save_themselves(auto, tmp_path):
    language_model = make_mla()
    language_model.save_pretrained(tmp_path / "source")
    model = auto.from_pretrained(tmp_path / "source")
    assert type(model) is HEADS[auto]
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, language_model.model.get_parameter(name)), name
    model.save_pretrained(tmp_path / "head")
    again = auto.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens(2, 7))[0], model(tokens(2, 7))[0], rtol=0, atol=1e-6)


def test_a_reward_model_is_trained(tmp_path):
    make_mla().save_pretrained(tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source", num_labels=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": torch.tensor([ids.float().mean() / 50])} for ids in tokens(8, 10)]
    arguments = TrainingArguments(tmp_path / "out", max_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2)
    Trainer(model, arguments, train_dataset=rows).train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


CLEAN_LOAD = (
    BLOCK_PACKAGE
    + """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(model.model).__module__ == type(model).__module__
torch.save(model(torch.arange(3, 9)[None]).logits, sys.argv[2])
"""
)


def test_a_head_with_the_code_of_its_checkpoint(tmp_path):
    make_mla().save_pretrained(tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source", num_labels=3)
    model.save_pretrained(tmp_path / "head")
    # One thread, as here: sums over several are added in another order.
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", CLEAN_LOAD, str(tmp_path / "head"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(torch.arange(3, 9)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)
