"""Two hundred malformed inputs, drawn by a seed: each is refused in a sentence or two, or served whole.

After every case: exit status 0 or 2 and no traceback; no file outside the output folder; no output that is half there.
"""

import gzip
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import pico_tokenizer

from mha2mla.cli.main import main
from pico import make_source

CASES = 200
SECONDS = 30  # a case takes one; more is a hang
CONVERT = "--preset paper --rope-selection 2-norm --kv-lora-rank 12 --qk-rope-head-dim 4".split()
TEXT = ["--data", "{data}", "--samples", "2", "--length", "8"]

VALUES: list[Any] = [None, -1, 0, 1, 3, 2.5, "", "x", "\u0000", [], [[]], {}, {"a": None}, True, 1e400, "../x", 10**30]


def write_inputs(folder: Path) -> None:
    """One of each input: a checkpoint, a conversion of it, calibration text, items, a file of options."""
    source = folder / "source"
    make_source("gqa").save_pretrained(source)
    pico_tokenizer().save_pretrained(source)
    words = [" ".join(f"w{4 + (7 * i + j * j) % 90}" for j in range(40)) for i in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    choice = {"context": "w5 w6", "choices": ["w7", "w8 w9"], "answer": 1}
    (folder / "items.jsonl").write_text("".join(json.dumps({"id": str(i), **choice}) + "\n" for i in range(4)))
    (folder / "options.yaml").write_text(
        "kv_lora_rank: 12\nqk_rope_head_dim: 4\npreset: paper\nrope_selection: high\n"
    )
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", make_source("gqa").lm_head.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arguments = [
        str(source),
        str(folder / "converted"),
        *CONVERT,
        *(a.format(data=folder / "text.jsonl") for a in TEXT),
    ]
    assert main(["convert", *arguments]) == 0


def damage_bytes(path: Path, random: random.Random) -> str:
    """Cut a file, empty it, overwrite a part or put rubbish in."""
    content = bytearray(path.read_bytes())
    way = random.choice(["cut", "empty", "overwrite", "insert", "rubbish"])
    # The head of a file is where formats say what they are.
    place = random.randrange(max(1, random.choice([16, 200, len(content)])))
    noise = random.randbytes(random.choice([1, 8, 64]))
    if way == "cut":
        content = content[:place]
    elif way == "empty":
        content = bytearray()
    elif way == "overwrite":
        content[place : place + len(noise)] = noise
    elif way == "insert":
        content[place:place] = noise
    else:
        content = bytearray(random.randbytes(300))
    path.write_bytes(bytes(content))
    return f"{way} {path.name} at {place}"


def damage_value(value: Any, random: random.Random) -> Any:
    """The same JSON with one place changed: removed, of another type, or out of range."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        if random.random() < 0.25:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: damage_value(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        return [*value[:place], damage_value(value[place], random), *value[place + 1 :]]
    return random.choice(VALUES)


def damage_json(path: Path, random: random.Random) -> str:
    value = damage_value(json.loads(path.read_text()), random)
    path.write_text(json.dumps(value))
    return f"{path.name}: {json.dumps(value)[:300]}"


def damage_lines(path: Path, random: random.Random) -> str:
    """JSON Lines with one row changed."""
    rows = path.read_text().splitlines()
    place = random.randrange(len(rows))
    rows[place] = json.dumps(damage_value(json.loads(rows[place]), random))
    path.write_text("\n".join(rows) + "\n")
    return f"{path.name}:{place + 1}: {rows[place][:300]}"


def damage_index(path: Path, random: random.Random) -> str:
    """An index beside the weights, of which one place is wrong."""
    names = ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    value = damage_value(index, random)
    (path / "model.safetensors.index.json").write_text(json.dumps(value))
    return f"index: {json.dumps(value)}"


# Which command reads what, and how that is damaged: paths within the folder of inputs.
TARGETS: list[tuple[str, str, Callable[[Path, random.Random], str]]] = [
    ("convert", "source/config.json", damage_json),
    ("convert", "source/config.json", damage_json),
    ("convert", "source/config.json", damage_bytes),
    ("convert", "source/model.safetensors", damage_bytes),
    ("convert", "source/model.safetensors", damage_bytes),
    ("convert", "source", damage_index),
    ("convert", "source/tokenizer.json", damage_json),
    ("convert", "source/tokenizer.json", damage_bytes),
    ("convert", "source/tokenizer_config.json", damage_json),
    ("convert", "source/generation_config.json", damage_json),
    ("convert", "text.jsonl", damage_lines),
    ("convert", "text.jsonl", damage_bytes),
    ("convert", "options.yaml", damage_bytes),
    ("convert", "model.gguf", damage_bytes),
    ("convert", "model.gguf", damage_bytes),
    ("eval", "items.jsonl", damage_lines),
    ("eval", "items.jsonl", damage_bytes),
    ("eval", "converted/conversion.json", damage_json),
    ("eval", "converted/config.json", damage_json),
    ("export", "converted/conversion.json", damage_json),
    ("export", "converted/config.json", damage_json),
    ("export", "converted/model.safetensors", damage_bytes),
    ("train", "converted/conversion.json", damage_json),
    ("train", "converted/config.json", damage_json),
    ("train", "text.jsonl", damage_lines),
]


def command_line(command: str, target: str, folder: Path, output: Path) -> list[str]:
    text = [argument.format(data=folder / "text.jsonl") for argument in TEXT]
    if command == "eval":
        models = [str(folder / "source"), str(folder / "converted")]
        return ["eval", *models, "--data", str(folder / "items.jsonl"), "--output", str(output)]
    if command == "export":
        return ["export", str(folder / "converted"), str(output)]
    if command == "train":
        line = ["train", "--model", str(folder / "converted"), "--data", str(folder / "text.jsonl"), "--length", "8"]
        return [*line, "--output", str(output), "--max_steps", "1", "--report_to", "none", "--use_cpu"]
    if target == "options.yaml":
        return ["convert", str(folder / "source"), str(output), "--config", str(folder / target)]
    source = folder / (target if target.endswith(".gguf") else "source")
    return ["convert", str(source), str(output), *CONVERT, *text]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", range(8))
def test_malformed_inputs_end_in_a_sentence(part, inputs, tmp_path, capsys):
    for number in range(part, CASES, 8):
        draw = random.Random(number)
        command, target, damage = TARGETS[number % len(TARGETS)]
        folder, place = tmp_path / f"{number}", tmp_path / f"{number}" / "place"
        shutil.copytree(inputs, folder / "in")
        place.mkdir()
        what = damage(folder / "in" / target, draw)
        if target == "text.jsonl" and draw.random() < 0.2:
            what += ", gzipped by name only"
            (folder / "in" / "text.jsonl.gz").write_bytes(gzip.compress(b"{")[: draw.randrange(20)])
        before = snapshot(folder / "in")
        start = time.monotonic()
        line = command_line(command, target, folder / "in", place / "out")
        status = main(line)
        error = capsys.readouterr().err
        case = f"case {number}, {command}, {what}:\n{error[-1500:]}"
        assert status in (0, 2), case
        assert "Traceback" not in error, case
        assert time.monotonic() - start < SECONDS, case
        assert snapshot(folder / "in") == before, case
        assert {path.name for path in place.iterdir()} <= {"out"}, case
        if status == 2:
            told = error.strip().splitlines()[-1]
            assert told.startswith(f"mha2mla {command}: error: ") and len(told) > 40, case
            if command in ("convert", "export"):
                assert not (place / "out").exists(), case
        shutil.rmtree(folder)
