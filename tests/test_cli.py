"""The dialect of the commands, and what they say when something goes wrong."""

import errno
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from mha2mla.cli import push
from mha2mla.cli.main import COMMANDS, main
from mha2mla.cli.parsing import Names, Sizes, parse, peek
from mha2mla.common.device import check_device


@dataclass
class Options:
    name_of_it: str | None = field(default=None, metadata={"help": "A name."})
    kind: Literal["one", "two"] = field(default="one", metadata={"help": "A kind."})
    share: float = field(default=0.5, metadata={"help": "A share.", "aliases": ["--part"]})
    fast: bool = field(default=False, metadata={"help": "A flag."})
    tasks: Names = field(default=Names("a"), metadata={"help": "Names."})
    sizes: Sizes = field(default=Sizes("1"), metadata={"help": "Sizes."})
    layers: list[int] = field(default_factory=lambda: [0], metadata={"help": "Numbers."})

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must lie between 0 and 1.")


POSITIONALS = {"folders": dict(nargs="+", type=Path, help="Folders.")}


def read(*argv, positionals=POSITIONALS):
    return parse(list(argv), "mha2mla test", Options, positionals=positionals)


def test_dashes_underscores_flags_and_lists():
    for name in ("--name-of-it", "--name_of_it"):
        options, given = read("a", "b", name, "x", "--fast", "--tasks", "u,v", "--sizes=3,4", "--layers", "5", "6")
        assert options == Options("x", "one", 0.5, True, ("u", "v"), (3, 4), [5, 6])
        assert given.folders == [Path("a"), Path("b")]
    options, given = read("--fast", "a")  # a flag takes no positional argument for its value
    assert options.fast and given.folders == [Path("a")]
    assert read("--fast", "false", "a")[0].fast is False
    assert parse([], "mha2mla test", Options) == (Options(),)


def test_a_file_says_the_same_and_the_command_line_wins(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "name-of-it: 3\nkind: two\npart: 2.5e-1\nfast: true\ntasks: [u, v]\nsizes: 7\nlayers: [5]\nfolders: [a, b]\n"
    )
    options, given = read("--config", str(file))
    assert options == Options("3", "two", 0.25, True, ("u", "v"), (7,), [5])
    assert given.folders == [Path("a"), Path("b")]
    options, given = read("c", f"--config={file}", "--kind", "one", "--tasks", "w")
    assert (options.kind, options.tasks, options.share, given.folders) == ("one", ("w",), 0.25, [Path("c")])
    assert peek(["--config", str(file)], "kind") == "two"
    assert (peek(["--kind", "x", "--config", str(file)], "kind"), peek([], "kind")) == ("x", None)


@pytest.mark.parametrize(
    "content, message",
    [
        ("kinds: one\n", r"options.yaml: there is no argument 'kinds' \(is it kind\?\)"),
        ("kind: three\n", r"options.yaml: kind: 'three' must be one of one, two"),
        ("share: much\n", r"options.yaml: share: 'much' does not fit"),
        ("layers: [a]\n", r"options.yaml: layers: \['a'\] does not fit"),
        ("sizes: [3, 0]\n", r"options.yaml: sizes: \[3, 0\] does not fit \(must be above 0"),
        ("config: other.yaml\n", r"options.yaml: there is no argument 'config'"),
        ("help: true\n", r"options.yaml: there is no argument 'help'"),
        ("name-of-it:\nkind:\n", r"options.yaml: kind has no value"),
        ("[a]\n", r"options.yaml must hold `name: value` lines, got list"),
        ("a: [\n", r"options.yaml.* is not YAML"),
        ("share: 2\n", r"share=2.0 must lie between 0 and 1"),
    ],
)
def test_what_a_file_may_not_say(content, message, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read("a", "--config", str(file))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["a", "--nmae-of-it", "x"], r"there is no option --nmae-of-it \(is it --name-of-it\?\)"),
        (["a", "--zzz=3"], r"there is no option --zzz=3\. `mha2mla test --help`"),
        (["a", "--name", "x"], "there is no option --name"),  # no abbreviations
        ([], "the following arguments are required: folders"),
        (["a", "--kind", "three"], "invalid choice: 'three'"),
        (["a", "--share", "much"], "invalid float value: 'much'"),
        (["a", "--fast=maybe"], "got maybe"),
        (["a", "--share"], "expected one argument"),
        (["a", "--config"], "expected one argument"),
        (["a", "--config", "nowhere.yaml"], "There is no file nowhere.yaml"),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(ValueError, match=message):
        read(*argv)
    with pytest.raises(ValueError, match="there is no place for b"):
        read("a", "b", positionals={"folder": dict(help="One.")})


@pytest.mark.parametrize(
    "argv", [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join
)
def test_version_and_help_wait_for_neither_torch_nor_transformers(argv):
    program = "import sys; from mha2mla.cli.main import main\ntry: main(sys.argv[1:])\n"
    program += "finally: print({'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")
    if len(argv) == 2:
        assert "--config" in done.stdout
        assert not re.search(r"^  --\w+_", done.stdout, re.MULTILINE)  # of both spellings, one is shown


def test_help_of_training_is_short_or_whole(capsys):
    from mha2mla.cli.train import parse_arguments

    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse_arguments([word])
        shown[word] = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--distillation-weight", "--decay-fraction", "--bf16"} - shown["--help"] == {"--bf16"}
    assert shown["--help"] | {"--bf16", "--max-steps"} <= shown["--help-all"]


def failing(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "needs the Python package 'peft'"),
        (ImportError("Please install gguf>=0.10.0"), 2, "error: Please install gguf>=0.10.0"),
        (ModuleNotFoundError("No module named 'mha2mla.x'", name="mha2mla.x"), 1, "this is a bug of mha2mla"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 2, "The disk is full (x.bin). Make room"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "The disk is full. Make room"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 2, "The disk is full. Make room"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), 2, "error: a/b: No such file or dir"),
        (OSError("a is no model.\nTry another"), 2, "error: a is no model. Try another"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "Out of memory (CUDA out of memory). Lower batch"),
        (ValueError("from a library"), 1, "this is a bug of mha2mla"),
        (TypeError("of ours"), 1, "this is a bug of mha2mla"),
    ],
)
def test_sentences_for_users_and_tracebacks_for_us(error, status, message, monkeypatch, capsys):
    monkeypatch.setattr(push, "main", failing(error))
    assert main(["push"]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert ("Traceback" in printed) == (status == 1)
    assert status == 1 or len(printed.splitlines()) == 1


def test_only_raise_statements_of_this_package_speak_to_users(monkeypatch, capsys):
    monkeypatch.setattr(push, "main", lambda argv: check_device("gpu"))
    assert main(["push"]) == 2
    assert capsys.readouterr().err == (
        "mha2mla push: error: device='gpu' is none that torch knows: say cpu, cuda, cuda:1, mps or xpu.\n"
    )
    monkeypatch.setattr(push, "main", lambda argv: Sizes("3,x"))  # int() raises in a line of ours: no sentence
    assert main(["push"]) == 1
    assert "ValueError: invalid literal for int()" in capsys.readouterr().err


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(push, "main", failing(KeyboardInterrupt()))
    assert main(["push"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "m", "--tasks", "mmlu"),
        ("bench", "--random", "pico"),
        ("convert", "m", "out", "--cache-ratio", "0.5", "--data", "texts.jsonl"),
    ],
)
def test_devices_are_looked_at_first(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # `make demo` leaves a folder of the output's name
    monkeypatch.setattr("mha2mla.evaluation.tasks.require_harness_task", lambda name: None)
    assert main([*command, "--device", "gpu"]) == 2
    assert "device='gpu' is none that torch knows" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*command, "--device", "cuda"]) == 2
        assert "sees no cuda device here. Say cpu." in capsys.readouterr().err


def test_train_knows_output_by_the_common_word(tmp_path):
    from mha2mla.cli.train import parse_arguments

    common = ["--model", "m", "--data", "d", "--use_cpu"]
    for word in ("--output", "--output_dir", "--output-dir"):
        assert parse_arguments([*common, word, "o"])[3].output_dir == "o"
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"output": "o", "max-steps": 3}))
    training = parse_arguments([*common, "--config", str(file)])[3]
    assert (training.output_dir, training.max_steps) == ("o", 3)


def test_every_command_has_a_line_in_the_list(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)
    assert main(["evla"]) == 2
    assert "there is no command 'evla'" in capsys.readouterr().err
