"""The train command from end to end on pico models: outputs, resumption, several processes, errors before loading."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import launch, pico_tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla.cli.main import main
from mha2mla.cli.train import parse_arguments
from mha2mla.conversion.config import ConversionConfig
from mha2mla.conversion.summary import RECIPE_ROWS, compare_and_recover
from mha2mla.training import RecoveryTrainer, run
from mha2mla.training.resume import newest_checkpoint
from pico import BLOCK_PACKAGE, VOCAB, make_mla, make_source, tokens

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"

CLEAN_LOAD = (
    BLOCK_PACKAGE
    + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert model.config.use_cache and model.generation_config.eos_token_id in (2, [2])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("w5 w6 w7", return_tensors="pt").input_ids
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[2])
"""
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A converted model, its source, and texts."""
    for name, model in (("mla", make_mla("shared")), ("source", make_source())):
        model.save_pretrained(tmp_path / name)
        pico_tokenizer().save_pretrained(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    with open(tmp_path / "texts.jsonl", "w") as file:
        for _ in range(60):
            count = int(torch.randint(2, 40, (1,), generator=generator))
            words = torch.randint(4, VOCAB, (count,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in words)}) + "\n")
    return tmp_path


def check_loads_anywhere(folder, checkpoint):
    """In a process without this package, and with the same logits."""
    run = [sys.executable, "-c", CLEAN_LOAD, str(checkpoint), str(folder / "logits.pt")]
    clean = environment(folder, HF_MODULES_CACHE=str(folder / "modules"))
    done = subprocess.run(run, env=clean, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    ids = AutoTokenizer.from_pretrained(checkpoint)("w5 w6 w7", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, rtol=0, atol=1e-6)


def arguments(folder, output, *more, data="texts.jsonl"):
    fixed = (
        "--use_cpu",
        "--disable_tqdm",
        "true",
        "--logging_steps",
        "1",
        "--length",
        "16",
        "--learning_rate",
        "1e-2",
    )
    sizes = ("--max_steps", "6", "--save_steps", "2", "--per_device_train_batch_size", "2")
    places = ("--model", folder / "mla", "--data", folder / data, "--output_dir", folder / output)
    return ["train", *map(str, (*places, *fixed, *sizes, *more))]


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def environment(tmp_path, **more):
    return os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), **more}


def test_compiled_layers_give_the_same_losses(folder):
    teacher = ("--teacher", folder / "source", "--hidden_weight", 1, "--kv_cache_dtype", "fp8")
    for output, more in (("eager", ()), ("compiled", ("--compile_layers",))):
        assert main(arguments(folder, output, *teacher, *more)) == 0
    assert losses(folder / "compiled") == pytest.approx(losses(folder / "eager"), rel=1e-4)
    saved, expected = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("compiled", "eager"))
    for (name, tensor), wanted in zip(saved.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-4, msg=name)


def test_full_run_with_teacher_leaves_complete_checkpoints(folder):
    teacher = ("--teacher", folder / "source", "--eval_fraction", 0.2, "--eval_strategy", "steps", "--eval_steps", 3)
    assert main(arguments(folder, "out", *teacher, "--attention_learning_rate", 2e-2, "--kv_cache_dtype", "fp8")) == 0
    out = folder / "out"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["num_input_tokens_seen"] for entry in logged] == [32 * step for step in range(1, 7)]
    assert all("learning_rate" in entry and "train_tokens_per_second" in entry for entry in logged)
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert len([entry for entry in history if "eval_perplexity" in entry]) == 2
    card = (out / "README.md").read_text()
    for part in (
        "texts.jsonl 100 %",
        "| Steps | 6 |",
        "| Tokens | 192 |",
        "KL(",
        "perplexity",
        "instead of 48",
        "0.01 (attention 0.02)",
        "entries rounded to fp8",
        'targets = ["q_proj", "kv_a_proj", "kv_b_proj", "o_proj"]',
    ):
        assert part in card, part

    names = {path.name for path in (out / "checkpoint-2").iterdir()}
    assert {"modeling_mla_llama.py", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert json.loads((out / "checkpoint-2" / "config.json").read_text())["use_cache"] is True
    check_loads_anywhere(folder, out / "checkpoint-4")

    assert main(arguments(folder, "out")) == 2  # never over an earlier run


def test_lora_run_saves_adapter_and_merged_model(folder):
    assert main(arguments(folder, "out", "--trainable", "lora", "--lora_rank", 2, "--merge")) == 0
    out, ids = folder / "out", tokens(2, 9)
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(out)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged")(ids).logits
        checkpoint = AutoPeftModelForCausalLM.from_pretrained(out / "checkpoint-6")(ids).logits
        untrained = AutoModelForCausalLM.from_pretrained(folder / "mla")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(checkpoint, adapted)
    assert (adapted - untrained).abs().max() > 1e-3
    assert not list(out.glob("model*.safetensors")) and "AutoPeftModelForCausalLM" in (out / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in (out / "merged" / "README.md").read_text()


def test_attention_stage_moves_attention_alone(folder):
    options = ("--objective", "attention", "--teacher", folder / "source", "--trainable", "self_attn")
    assert main(arguments(folder, "out", *options)) == 0
    before = AutoModelForCausalLM.from_pretrained(folder / "mla").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder / "out").state_dict().items():
        assert torch.equal(tensor, before[name]) != (name.endswith("proj.weight") and "self_attn" in name), name


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("streaming", [(), ("--streaming", "--shuffle_buffer", "8")])
def test_resumed_run_continues_the_same_curve(trainable, streaming, folder):
    """The newest complete checkpoint is taken, not one that was being written; what followed it comes out the same."""
    options = ("--gradient_accumulation_steps", 2, "--trainable", trainable, *streaming)
    assert main(arguments(folder, "out", *options)) == 0
    expected = losses(folder / "out")
    (folder / "out" / "checkpoint-6" / "trainer_state.json").write_text("{")  # killed while writing it
    assert newest_checkpoint(folder / "out").name == "checkpoint-4"
    assert main(arguments(folder, "out", *options, "--resume_from_checkpoint", "true")) == 0
    assert losses(folder / "out") == expected and len(set(expected)) == 6


def test_killed_run_resumes_to_the_losses_of_an_uninterrupted_one(folder):
    options = ("--max_steps", 40, "--save_steps", 4, "--resume_from_checkpoint", "true")
    command = [sys.executable, "-m", "mha2mla.cli.main", *arguments(folder, "killed", *options)]
    process = subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while newest_checkpoint(folder / "killed") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert 4 <= int(newest_checkpoint(folder / "killed").name.split("-")[-1]) < 40
    assert main(arguments(folder, "killed", *options)) == 0
    assert main(arguments(folder, "whole", *options)) == 0
    assert losses(folder / "killed") == losses(folder / "whole")
    assert len(losses(folder / "whole")) == 40


@pytest.mark.xdist_group("several processes")
def test_two_processes_give_the_curve_of_one(folder):
    """Gloo on the CPU; each process takes half of the rows of a step. The same processes then try FSDP2."""
    options = ("--teacher", folder / "source", "--streaming", "--shuffle_buffer", 8)
    assert main(arguments(folder, "one", *options)) == 0
    command = arguments(folder, "two", *options, "--per_device_train_batch_size", 1)
    script = Path(__file__).parent / "two_processes.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = launch(lambda port: [*torchrun, f"--master_port={port}", script, *command], environment(folder))
    assert done.returncode == 0, done.stderr
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-4)
    assert "| Tokens | 192 |" in (folder / "two" / "README.md").read_text()
    check_loads_anywhere(folder, folder / "two" / "sharded")
    whole, sharded = (load_file(folder / "two" / name) for name in ("model.safetensors", "sharded/model.safetensors"))
    assert set(whole) == {*sharded, "lm_head.weight"}  # which are tied, and there once


def test_shipped_accelerate_configurations_are_read():
    folder = EXAMPLES / "accelerate"
    read = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    kinds = {name: str(config.distributed_type).rpartition(".")[2] for name, config in read.items()}
    assert kinds == {"fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    # Checkpoints that from_pretrained loads
    assert read["fsdp2"].fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert read["fsdp2"].fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    assert read["zero3"].deepspeed_config["zero3_save_16bit_model"] is True


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_the_example_script_does_what_the_command_does(folder, trainable):
    options = ("--teacher", folder / "source", "--trainable", trainable, "--kv_cache_dtype", "fp8")
    assert main(arguments(folder, f"command-{trainable}", *options)) == 0
    script = runpy.run_path(str(EXAMPLES / "train.py"))
    script["main"](arguments(folder, f"script-{trainable}", *options)[1:])
    last = [folder / f"{name}-{trainable}" / "checkpoint-6" for name in ("command", "script")]
    assert losses(last[1]) == losses(last[0])
    weights = "adapter_model.safetensors" if trainable == "lora" else "model.safetensors"
    assert (last[1].parent / weights).is_file()


# What a CPU cannot do, and what a pico model and a test have less of.
SMALL = dict(use_cpu=True, bf16=False, compile_layers=False, attn_implementation="sdpa", dtype="float32")
SMALL |= dict(max_steps=2, length=16, short_lengths=[4, 8])
SMALL |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=1)


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("recovery*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_trains(folder, recipe):
    options = yaml.safe_load(recipe.read_text()) | SMALL | {"logging_steps": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    places = ("--model", folder / "mla", "--teacher", folder / "source", "--data", folder / "texts.jsonl")
    command = ["train", "--config", folder / "run.yaml", *places, "--output", folder / "out"]
    assert main([*map(str, command)]) == 0
    made = folder / "out" / "merged" if options.get("merge") else folder / "out"
    assert len(losses(folder / "out")) == 2
    AutoModelForCausalLM.from_pretrained(made)


def test_the_shipped_recipe_is_read():
    path = EXAMPLES / "recovery.yaml"
    given = ["--model", "m", "--teacher", "t", "--data", "d", "--output_dir", "o", "--use_cpu"]
    model, loss, data, training = parse_arguments(["--config", str(path), *given])
    losses = loss.losses
    assert model.kv_cache_dtype == "fp8"
    weights = losses["distillation"].distillation_weight, losses["hidden"].hidden_weight
    assert (*weights, data.short_lengths, data.lookback_share) == (1, 4, [64, 128, 256], 0.125)
    assert (training.learning_rate, training.decay_fraction, training.compile_layers) == (2.4e-4, 0.5, True)
    assert training.attention_learning_rate == 1e-3
    assert (data.length, training.gradient_accumulation_steps) == RECIPE_ROWS


def test_a_model_of_a_shorter_context_is_told_how_to_take_the_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(EXAMPLES.parents[1])
    options = ConversionConfig(data="texts.jsonl", device="cuda")
    for context, more in ((8192, ""), (4096, "--length 4096 --gradient_accumulation_steps 4 ")):
        _, command = compare_and_recover("source", Path("out"), options, context)
        recipe = "mha2mla train --config docs/examples/recovery.yaml "
        assert command == f"{recipe}{more}--model out --teacher source --data texts.jsonl --output out-recovered"
    monkeypatch.chdir(tmp_path)  # no checkout
    _, elsewhere = compare_and_recover("source", Path("out"), options, context)
    assert elsewhere == f"{command}  # its recipe: https://github.com/mha2mla/mha2mla/tree/main/docs/examples"


def test_yaml_and_command_line_say_the_same_and_the_latter_wins(folder):
    path = folder / "run.yaml"
    path.write_text("model: m\ndata: d\noutput_dir: o\nlearning_rate: 1e-3\nlora_targets: [q_proj]\nmerge: true\n")
    command = ["--config", str(path), "--data", "e", "--trainable", "lora", "--use_cpu"]
    with pytest.raises(ValueError, match="merge belongs to --trainable lora"):
        parse_arguments(command[:2])
    model, _, data, training = parse_arguments(command)
    assert (model.model, model.lora_targets, model.merge, data.data) == ("m", ["q_proj"], True, "e")
    assert (training.learning_rate, training.output_dir) == (1e-3, "o")
    path.write_text("modle: m\n")
    with pytest.raises(ValueError, match="no argument 'modle'"):
        parse_arguments(command)
    with pytest.raises(ValueError, match=r"There is no file .*no\.yaml"):
        parse_arguments(["--config", str(folder / "no.yaml")])


def test_bad_input_is_refused_before_the_model_loads(folder, monkeypatch, capsys):
    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "load_model", load)
    other = make_source("mqa")
    other.resize_token_embeddings(VOCAB + 4)
    other.save_pretrained(folder / "other")
    make_mla("shared", tie_word_embeddings=True).save_pretrained(folder / "tied")
    tied = ("--model", folder / "tied", "--trainable", "lora", "--lora_targets", "q_proj", "lm_head")
    (folder / "ids.jsonl").write_text('{"blob_id": "0f"}\n')
    (folder / "empty.jsonl").write_text("")
    matching = ("--objective", "attention", "--teacher", folder / "source")
    for more, message in (
        (("--data", folder / "ids.jsonl"), "no column 'text'; it has blob_id"),
        (("--data", folder / "empty.jsonl"), "it is empty"),
        (("--data", "papr"), "is no recipe"),
        (("--teacher", folder / "other"), "has vocab_size=100, the model 96"),
        (("--teacher", folder / "nowhere"), "teacher: there is no folder"),
        (("--model", folder / "source"), "is not converted. Run `mha2mla convert` first"),
        (tied, "'lm_head' has its weight in common with another module (this model ties embed_tokens and lm_head)"),
        (("--model", folder / "nowhere"), "model: there is no folder"),
        (("--trainable", "lora", "--lora_targets", "k_proj"), "'k_proj' is no linear layer"),
        (("--trainable", "k_proj"), "'k_proj' is found in no parameter's name"),
        (("--objective", "attention"), "give --teacher"),
        (matching, "--trainable self_attn"),
        (
            (*matching, "--trainable", "lora", "--lora_targets", "q_proj", "up_proj"),
            "mlp.up_proj would be trained too",
        ),
        (("--length", "64"), "length=64 is more than the model's context, 32"),
        (("--distillation_weight", "1.5"), "distillation_weight=1.5 must lie between 0 and 1"),
        (("--temperature", "0"), "temperature=0.0 must be above 0"),
        (("--hidden_weight", "1"), "hidden_weight=1.0 adds to the distance to a teacher"),
        (("--trainable", "lora", "--push_to_hub"), "a folder that nobody else has"),
        (("--eval_strategy", "steps"), "give --eval_data or --eval_fraction"),
        (("--streaming", "--max_steps", "-1"), "give --max_steps"),
        (("--resume_from_checkpoint", folder / "mla"), "is no complete checkpoint"),
    ):
        assert main(arguments(folder, "out", *more)) == 2, message
        assert message in capsys.readouterr().err
    for name, value in (
        ("ACCELERATE_USE_FSDP", "true"),
        ("FSDP_VERSION", "2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"),
    ):
        monkeypatch.setenv(name, value)  # as `accelerate launch` does
    assert main(arguments(folder, "out")) == 2
    assert "fsdp_cpu_ram_efficient_loading: true with FSDP2" in capsys.readouterr().err


def test_a_finished_run_is_left_alone(folder, caplog, capsys):
    resume = ("--resume_from_checkpoint", "true")
    assert main(arguments(folder, "out", *resume)) == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}
    for more in ((), ("--max_steps", 4)):
        caplog.clear()
        assert main(arguments(folder, "out", *resume, *more)) == 0
        assert "there is nothing left to do" in caplog.text
        assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")} == before
    assert main(arguments(folder, "out")) == 2
    assert "finished after 6 steps: there is nothing left to do" in capsys.readouterr().err
    assert main(arguments(folder, "out", *resume, "--max_steps", 8)) == 0  # more steps are more to do
    assert len(losses(folder / "out")) == 8


def test_a_run_that_ends_worse_than_it_began_says_so(folder, caplog):
    teacher = ("--teacher", folder / "source", "--logging_steps", 1)
    for name, rate in (("good", 1e-3), ("bad", 2)):
        caplog.clear()
        assert main(arguments(folder, name, *teacher, "--learning_rate", rate, "--attention_learning_rate", rate)) == 0
        first = losses(folder / name)[0]
        if name == "good":
            assert f"Loss of the first step's rows: {first:.3g} before it" in caplog.text
        else:
            assert f"The loss of the first step's rows rose from {first:.3g}" in caplog.text
            assert "lower --learning_rate (now 2) and --attention_learning_rate (2) to a tenth" in caplog.text


def test_the_change_is_that_of_the_same_rows(folder, caplog):
    """At rate 0 nothing changes, though every batch has a loss of its own; a resumed run has no first step."""
    still = ("--learning_rate", 0, "--logging_steps", 1)
    assert main(arguments(folder, "still", *still)) == 0
    each = losses(folder / "still")
    assert max(each) > 1.01 * min(each)
    assert f"{each[0]:.3g} before it, {each[0]:.3g} now" in caplog.text
    assert main(arguments(folder, "parts", *still, "--gradient_accumulation_steps", 3)) == 0  # all rows of the step
    whole = losses(folder / "parts")[0]
    assert f"{whole:.3g} before it, {whole:.3g} now" in caplog.text
    caplog.clear()
    assert main(arguments(folder, "still", *still, "--resume_from_checkpoint", "true", "--max_steps", 8)) == 0
    assert "first step's rows" not in caplog.text


@pytest.mark.parametrize("length", [("--max_steps", 6), ("--max_steps", -1, "--num_train_epochs", 0.15)])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_run_killed_at_its_end_is_saved_without_another_step(length, trainable, folder, caplog, monkeypatch):
    options = ("--trainable", trainable, "--eval_fraction", 0.2, *length)
    assert main(arguments(folder, "whole", *options)) == 0
    save_model = RecoveryTrainer.save_model

    def killed(self, output_dir=None, _internal_call=False):
        if output_dir is None:
            raise KeyboardInterrupt
        save_model(self, output_dir, _internal_call)

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "save_model", killed)
        assert main(arguments(folder, "out", *options)) == 130
    assert not (folder / "out" / "README.md").exists()
    assert main(arguments(folder, "out", *options, "--resume_from_checkpoint", "true")) == 0
    assert "nothing is left to train" in caplog.text
    name = "adapter_model.safetensors" if trainable == "lora" else "model.safetensors"
    got, expected = (load_file(folder / output / name) for output in ("out", "whole"))
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)
    states = [json.loads((folder / output / "trainer_state.json").read_text()) for output in ("out", "whole")]
    assert states[0]["global_step"] == states[1]["global_step"]
    assert losses(folder / "out") == losses(folder / "whole")
    perplexities = [[line["eval_perplexity"] for line in s["log_history"] if "eval_loss" in line] for s in states]
    assert perplexities[0] == perplexities[1] and len(perplexities[0]) == 1


def test_a_generation_config_that_cannot_be_saved_is_mended(folder, caplog):
    path = folder / "mla" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    for output, more in (("out", ()), ("lora", ("--trainable", "lora", "--merge"))):
        assert main(arguments(folder, output, *more)) == 0
    assert "generation_config: temperature, top_p cannot be saved" in caplog.text
    for saved in ("out", "out/checkpoint-2", "lora/merged"):
        config = json.loads((folder / saved / "generation_config.json").read_text())
        assert "temperature" not in config and "top_p" not in config and config["eos_token_id"] in (2, [2])


def test_the_usual_lora_targets_are_told_the_right_ones(folder, capsys):
    usual = ("--trainable", "lora", "--lora_targets", "q_proj", "k_proj", "v_proj", "o_proj")
    assert main(arguments(folder, "out", *usual)) == 2
    error = capsys.readouterr().err
    assert "'k_proj' is no linear layer" in error and "q_proj kv_a_proj kv_b_proj o_proj" in error


CUSTOM_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class PicoTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_code_of_a_tokenizer_runs_only_where_allowed(role, folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # transformers would ask
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    place = folder / ("mla" if role == "model" else "source")
    (place / "tokenization_pico.py").write_text(CUSTOM_TOKENIZER)
    config = json.loads((place / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "PicoTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_pico.PicoTokenizer"]},
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    options = ("--teacher", folder / "source", "--max_steps", 1)
    assert main(arguments(folder, "out", *options)) == 2
    error = capsys.readouterr().err
    assert f"{role}: {place} brings code of its own for its tokenizer" in error and "--trust_remote_code" in error
    assert main(arguments(folder, "out", *options, "--trust_remote_code")) == 0
    if role == "model":  # a checkpoint's users need it too
        assert (folder / "out" / "tokenization_pico.py").is_file()
