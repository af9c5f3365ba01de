"""What may go on from an output folder, and what is refused in a sentence rather than overwritten."""

import json
import os
import shutil

import pytest
import torch
from conftest import pico_tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mha2mla.cli.main import main
from pico import make_mla, make_source, tokens

RESUME = ("--resume_from_checkpoint", "true")
LORA = ("--trainable", "lora", "--lora_rank", "4")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_mla("shared").save_pretrained(folder / "mla")
    pico_tokenizer().save_pretrained(folder / "mla")
    texts = (" ".join(f"w{4 + (i * j) % 90}" for j in range(40)) for i in range(12))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def train(inputs, tmp_path, monkeypatch):
    """Run the command for two steps; gives its exit code."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    places = ("--model", inputs / "mla", "--data", inputs / "texts.jsonl", "--output", tmp_path / "out")
    fixed = ("--use_cpu", "--report_to", "none", "--length", 8, "--save_steps", 1, "--max_steps", 2)
    return lambda *more: main(["train", *map(str, (*places, *fixed, *more))])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more, remedy", [((), "by --model {out} --output NEW"), (LORA, "peft's merge_and_unload")])
def test_a_finished_run_without_checkpoints_is_not_begun_again(more, remedy, train, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*more, "--save_strategy", "no") == 0
    before = contents(out)
    for again in ((), (*RESUME, "--max_steps", 4)):
        assert train(*more, "--save_strategy", "no", *again) == 2
        error = capsys.readouterr().err
        assert "finished after 2 steps and no checkpoint to go on from" in error and remedy.format(out=out) in error
    assert train(*more, "--save_strategy", "no", *RESUME) == 0  # nothing is left to do
    assert contents(out) == before


@pytest.mark.parametrize(
    "first, then, differs",
    [
        (LORA, ("--trainable", "all"), "trainable='lora', this run has trainable='all'"),
        ((), LORA, "trainable='all', this run has trainable='lora'"),
        ((), ("--trainable", "attention"), "trainable='all', this run has trainable='attention'"),
        (LORA, ("--trainable", "lora"), "lora_rank=4, this run has lora_rank=16"),
        (LORA, (*LORA, "--lora_alpha", "8"), "lora_alpha=32, this run has lora_alpha=8"),
        (LORA, (*LORA, "--lora_targets", "q_proj"), "this run has lora_targets=['q_proj']"),
        ((), ("--optim", "adafactor"), "optim='adamw_torch_fused', this run has optim='adafactor'"),
        (("--attention_learning_rate", "1e-3"), (), "attention_learning_rate=0.001, this run has attention_learning"),
        (LORA, (*LORA, "--model", "twin"), "/twin': it cannot go on"),
    ],
)
def test_other_settings_than_those_of_the_checkpoint_are_named(
    first, then, differs, train, inputs, tmp_path, monkeypatch, capsys
):
    shutil.copytree(inputs / "mla", tmp_path / "twin")
    monkeypatch.chdir(tmp_path)
    assert train(*first) == 0
    assert train(*first, *RESUME, "--max_steps", 3) == 0
    assert train(*then, *RESUME, "--max_steps", 4) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert differs in error and error.endswith("Give the same, or another --output for a new run.")


@pytest.mark.parametrize(
    "then, differs",
    [
        (("--length", "16"), "length=8, this run has length=16"),
        (("--data", "others.jsonl"), "this run has data='others.jsonl'"),
        (("--seed", "7"), "seed=42, this run has seed=7"),
        (("--gradient_accumulation_steps", "2"), "rows_per_step=8, this run has rows_per_step=16"),
        (("--lookback_share", "0.5"), "this run has lookback_share=0.5"),
        ((), ", this run has text='"),
    ],
)
def test_rows_in_another_order_are_named(then, differs, train, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (inputs / "texts.jsonl").read_text().splitlines(True)
    text = ("--data", "texts.jsonl")
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    assert train(*text) == 0
    (tmp_path / "others.jsonl").write_text("".join(lines[:-1]))
    if not then:
        (tmp_path / "texts.jsonl").write_text("".join(lines[:-1]))
    assert train(*text, *then, *RESUME, "--max_steps", 3) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert differs in error and error.endswith("or --ignore_data_skip to begin this text at its first row.")
    assert ("--gradient_accumulation_steps and processes" in error) == ("rows_per_step" in differs)
    assert train(*text, *then, *RESUME, "--max_steps", 3, "--ignore_data_skip") == 0


@pytest.mark.parametrize("more", [(), ("--streaming",)])
def test_the_same_rows_by_another_name_are_the_same(more, train, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    shutil.copy(inputs / "texts.jsonl", "texts.jsonl")
    (tmp_path / "mix.yaml").write_text("- {data: texts.jsonl}")
    assert train("--data", "texts.jsonl", *more) == 0
    shutil.move("texts.jsonl", "moved/texts.jsonl")
    (tmp_path / "mix.yaml").write_text("- {data: moved/texts.jsonl}")
    again = (*more, *RESUME, "--data")
    assert train(*again, "moved/text*.jsonl", "--column", "text", "--max_steps", 3) == 0
    assert train(*again, tmp_path / "moved" / "texts.jsonl", "--max_steps", 4) == 0
    assert train(*again, "mix.yaml", "--max_steps", 5) == 0
    (tmp_path / "mix.yaml").write_text(f"- {{data: moved/texts.jsonl}}\n- {{data: {inputs}/texts.jsonl}}")
    assert train(*again, "mix.yaml", "--max_steps", 6) == 2
    assert "this run has text='" in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_number_of_processes_packs_other_rows(train, tmp_path, capsys):
    assert train() == 0
    shutil.rmtree(tmp_path / "cache")
    assert train(*RESUME, "--num_proc", 2, "--max_steps", 3) == 2
    assert "num_proc=None, this run has num_proc=2" in capsys.readouterr().err


def test_an_adapter_goes_on_beside_a_model_that_was_moved(train, inputs, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(inputs / "mla", model)
    assert train(*LORA, "--model", model) == 0
    assert train(*LORA, "--model", model.rename(tmp_path / "moved"), *RESUME, "--max_steps", 3) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(name, train, tmp_path, caplog, capsys):
    assert train() == 0
    newest = tmp_path / "out" / "checkpoint-2"
    (newest / name).write_bytes((newest / name).read_bytes()[:-40])
    assert train(*RESUME, "--max_steps", 3) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(newest / name) in error and f"goes on from {newest}. Remove that folder" in error
    shutil.rmtree(newest)
    (tmp_path / "out" / "checkpoint-1" / f"._{name}").write_text("macOS's")
    assert train(*RESUME, "--max_steps", 3) == 0
    assert f"Going on from {tmp_path}/out/checkpoint-1" in caplog.text


def test_a_run_of_an_earlier_version_told_less(train, tmp_path):
    assert train() == 0
    (tmp_path / "out" / "run_settings.json").write_text('{"trainable": "all"}')
    assert train(*RESUME, "--max_steps", 3) == 0


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_can_be_read_by_whom_the_rest_can(umask, mode, train, tmp_path):
    make_source().save_pretrained(tmp_path / "source")
    pico_tokenizer().save_pretrained(tmp_path / "source")
    before = os.umask(umask)
    try:
        assert train(*LORA, "--merge") == 0
        how = ("--preset", "paper", "--rope-selection", "uniform", "--cache-ratio", "0.3125")
        assert main(["convert", str(tmp_path / "source"), str(tmp_path / "mla"), *how]) == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "out" / "merged", tmp_path / "mla"):
        assert [path.stat().st_mode & 0o777 for path in folder.glob("*.safetensors")] == [mode]


def test_a_finished_adapter_is_merged_afterwards(train, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*LORA, "--learning_rate", "1e-2") == 0
    adapter = load_file(out / "adapter_model.safetensors")
    assert train(*LORA, "--merge") == 2
    assert "Add that by --resume_from_checkpoint true --merge" in capsys.readouterr().err
    assert main(["export", str(out), str(tmp_path / "x")]) == 2
    assert f"trained it with `--resume_from_checkpoint true --merge` writes {out}/merged" in capsys.readouterr().err
    assert train(*LORA, *RESUME, "--merge") == 0
    assert all(
        torch.equal(tensor, adapter[name]) for name, tensor in load_file(out / "adapter_model.safetensors").items()
    )
    assert "| Steps | 2 |" in (out / "merged" / "README.md").read_text()
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out / "merged")(tokens(1, 6)).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(out)(tokens(1, 6)).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    before = contents(out)
    for command in (["export", out, tmp_path / "x"], ["eval", out, "--tasks", "long:counting", "--output", "y"]):
        for folder, remedy in ((out, f"Give {out}/merged"), (out / "checkpoint-2", "Merge it first (peft's")):
            assert main([str(folder if part is out else part) for part in command]) == 2
            assert remedy in capsys.readouterr().err
    assert train(*LORA, *RESUME, "--merge") == 0  # nothing is left to do
    assert contents(out) == before


@pytest.mark.parametrize("more", [(), RESUME])
def test_a_model_of_another_kind_is_no_place_for_a_run(more, train, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    make_source().save_pretrained(out)
    before = contents(out)
    assert train(*more) == 2
    assert "holds a model that is no run of this command (config.json), which would be lost" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize("more", [(), (*LORA, "--merge")])
def test_a_token_beyond_the_vocabulary_stays_the_tokenizers_own(more, train, inputs, tmp_path):
    """Added without resizing the model, as some finetunes have it."""
    model = tmp_path / "padded"
    make_mla("shared").save_pretrained(model)
    tokenizer = pico_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    assert tokenizer.pad_token_id >= make_mla("shared").config.vocab_size
    assert train(*more, "--model", model) == 0
    made = [tmp_path / "out" / "merged"] if more else [tmp_path / "out", tmp_path / "out" / "checkpoint-1"]
    for folder in made:
        config = AutoModelForCausalLM.from_pretrained(folder).config
        assert (config.vocab_size, config.pad_token_id) == (96, make_mla("shared").config.pad_token_id)


def test_text_with_a_token_that_the_model_does_not_know(train, inputs, tmp_path, capsys):
    make_mla("shared").save_pretrained(tmp_path / "model")
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "w5 extra w6 " * 20}) + "\n")
    assert train("--model", tmp_path / "model", "--data", tmp_path / "texts.jsonl") == 2
    assert "knows vocab_size=96 tokens" in capsys.readouterr().err
