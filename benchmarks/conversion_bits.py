"""Proof that a change of the code leaves conversions as they were, bit by bit.

    PYTHONPATH=OLD/src python benchmarks/conversion_bits.py write before.json
    PYTHONPATH=NEW/src python benchmarks/conversion_bits.py compare before.json

`write` makes pico source models of every kind and rope type, converts them with both presets through the command
`mha2mla convert`, and writes the sha256 of every tensor. `compare` does the same with the tree that it finds, and
names what differs. A real model joins with `--source FOLDER --data texts.jsonl`; `--cases REGEX` runs a part.

Equal bits can be expected of one machine and one torch only, so make both runs there; the sources' own hashes tell
whether they began with the same weights. One thread, as sums over several depend on how many there are.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import re
import string
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

import mha2mla.cli.main as command

# What an option is called in one tree or another, the newest name first; the tree's own --help tells which it knows.
SPELLINGS = {
    "output": ("--output",),  # else the second positional argument
    "data": ("--data", "--calibration-data"),
    "samples": ("--samples", "--calibration-samples"),
    "length": ("--length", "--calibration-length"),
    "preset": ("--preset",),
    "ratio": ("--cache-ratio",),
    "rank": ("--kv-lora-rank",),
    "rope": ("--qk-rope-head-dim",),
    "selection": ("--rope-selection",),
    "svd": ("--svd", "--low-rank"),
    "layout": ("--rope-layout",),
    "steps": ("--refine-steps",),
    "score_samples": ("--score-samples",),
    "dtype": ("--dtype",),
    "shard": ("--max-shard-size",),
    "frequencies": ("--rope-frequencies",),
}
# Options that older trees lack: they do what the value given here says.
NEWER = {"frequencies"}

LETTERS = string.ascii_letters + string.digits
BASE = dict(
    vocab_size=4 + len(LETTERS),
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
KINDS: dict[str, tuple[type, dict]] = {
    "mha": (LlamaConfig, dict(num_key_value_heads=4)),
    "gqa": (LlamaConfig, dict(num_key_value_heads=2)),
    "mqa": (LlamaConfig, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "head-dim": (LlamaConfig, dict(num_key_value_heads=2, head_dim=16)),
    "llama-bias": (LlamaConfig, dict(num_key_value_heads=2, attention_bias=True)),
    "mistral": (MistralConfig, dict(num_key_value_heads=2, sliding_window=None)),
    "qwen2": (Qwen2Config, dict(num_key_value_heads=2)),
}
ROPES: dict[str, dict] = {
    "default": {},
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=8),
    "llama3": dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8),
    "longrope": dict(
        factor=2.0,
        original_max_position_embeddings=16,
        short_factor=[1.0 + 0.1 * i for i in range(6)],
        long_factor=[1.5 + 0.3 * i for i in range(6)],
    ),
}
SOURCES = [(kind, "default") for kind in KINDS] + [("gqa", rope) for rope in ROPES if rope != "default"]
SOURCES += [("qwen2", "yarn")]  # biases and a scaled attention together

TEXT = dict(samples=6, length=24)
CALIBRATED = dict(preset="calibrated", **TEXT, score_samples=3, frequencies="per-layer")
REAL = dict(preset="calibrated", samples=4, length=128, score_samples=2, frequencies="per-layer")
# name: options of a conversion, in the words of SPELLINGS
PICO_CASES = {
    "paper uniform joint": dict(preset="paper", selection="uniform", svd="joint", rank=12, rope=4),
    "paper high split": dict(preset="paper", selection="high", svd="split", rank=12, rope=4),
    "paper low none": dict(preset="paper", selection="low", svd="none", rope=4),
    "paper 2-norm ratio": dict(preset="paper", selection="2-norm", svd="joint", ratio=0.5, **TEXT),
    "paper bfloat16 shards": dict(
        preset="paper", selection="uniform", svd="joint", ratio=0.5, dtype="bfloat16", shard="20KB"
    ),
    "calibrated closed": dict(CALIBRATED, rank=8, rope=6, steps=0),
    "calibrated refined": dict(CALIBRATED, rank=8, rope=6, steps=4),
    "calibrated searched": dict(CALIBRATED, ratio=0.6, steps=2),
    "calibrated per-head": dict(CALIBRATED, layout="per-head", rank=8, rope=4, steps=2),
}
REAL_CASES = {
    "paper uniform joint": dict(preset="paper", selection="uniform", svd="joint", ratio=0.3125),
    "paper 2-norm split": dict(preset="paper", selection="2-norm", svd="split", ratio=0.1875, samples=4, length=128),
    "calibrated refined": dict(REAL, rank=80, rope=40, steps=2),
    "calibrated searched": dict(REAL, ratio=0.1875, steps=0),
    "calibrated per-head": dict(REAL, layout="per-head", rank=78, rope=14, steps=1),
}


def make_source(folder: Path, kind: str, rope: str) -> None:
    """Save a random pico model, biases and norms included, with a tokenizer."""
    config_class, changes = KINDS[kind]
    parameters = {"rope_type": rope, "rope_theta": 1000.0, **ROPES[rope]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**BASE, **changes, rope_parameters=parameters))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    # Letter by letter, as AutoTokenizer makes a byte-level BPE of any tokenizer that lies beside a Qwen2 model.
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<s>", "</s>", "<unk>", *LETTERS))}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_text(path: Path) -> None:
    numbers = torch.randint(len(LETTERS), (20, 50), generator=torch.Generator().manual_seed(0))
    documents = ["".join(LETTERS[i] for i in row) for row in numbers.tolist()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def known_options() -> set[str]:
    """The options of this tree's `mha2mla convert`, as its help lists them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        command.main(["convert", "--help"])
    return set(re.findall(r"--[a-z][\w-]*", text.getvalue()))


def arguments(source: Path, output: Path, data: Path, options: dict, known: set[str]) -> list[str]:
    def spell(word: str) -> str | None:
        return next((name for name in SPELLINGS[word] if name in known), None)

    needs_text = "samples" in options
    words = {"output": output, **({"data": data} if needs_text else {}), **options}
    argv = ["convert", str(source)]
    for word, value in words.items():
        name = spell(word)
        if name is None and word in NEWER:
            continue
        if name is None and word != "output":
            raise SystemExit(f"`mha2mla convert` has none of {SPELLINGS[word]}: add its name to SPELLINGS.")
        argv += [str(value)] if name is None else [name, str(value)]
    return argv


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every tensor's type, shape and bytes, whatever file it lies in."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name).contiguous()
                digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
                found[name] = digest.hexdigest()
    return dict(sorted(found.items()))


def run(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The hashes of every conversion and of its source, by the name of the case."""
    known, found = known_options(), {}
    with tempfile.TemporaryDirectory(prefix="conversion-bits-") as temporary:
        work = Path(temporary)
        make_text(work / "texts.jsonl")
        plan = [(f"{kind} {rope}", PICO_CASES, work / "texts.jsonl") for kind, rope in SOURCES]
        if args.source:
            plan.append((args.source.name, REAL_CASES, args.data))
        for title, cases, data in plan:
            chosen = {f"{title}, {name}": options for name, options in cases.items()}
            chosen = {name: options for name, options in chosen.items() if re.search(args.cases, name)}
            if not chosen:
                continue
            source = args.source if data is args.data else work / title
            if source is not args.source:
                make_source(source, *title.split())
            found[f"{title}, source"] = hashes(source)
            for index, (name, options) in enumerate(chosen.items()):
                start, output = time.perf_counter(), work / f"{title} {index}"
                with contextlib.redirect_stderr(io.StringIO()) as log:
                    status = command.main(arguments(source, output, data, options, known))
                if status != 0:
                    raise SystemExit(f"{name} failed:\n{log.getvalue()}")
                found[name] = hashes(output)
                print(f"{name}: {len(found[name])} tensors, {time.perf_counter() - start:.1f} s", flush=True)
    return found


def differences(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """A line for every case of `now` that is not as before."""
    lines = []
    for name, tensors in now.items():
        if name not in before:
            lines.append(f"{name}: not in the file")
            continue
        old = before[name]
        for verb, names in (
            ("gone", old.keys() - tensors.keys()),
            ("new", tensors.keys() - old.keys()),
            ("other bits", {key for key in old.keys() & tensors.keys() if old[key] != tensors[key]}),
        ):
            if names:
                lines.append(f"{name}: {verb}: {len(names)} of {len(old)} tensors, {min(names)} among them")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path, help="Where the hashes are, or shall be.")
    parser.add_argument("--source", type=Path, help="Folder of a real model.")
    parser.add_argument("--data", type=Path, help="Calibration text for it.")
    parser.add_argument("--cases", default="", metavar="REGEX", help="Run only the cases whose name matches.")
    args = parser.parse_args()
    if (args.source is None) != (args.data is None):
        parser.error("--source and --data go together.")
    if args.action == "compare" and not args.file.is_file():
        parser.error(f"{args.file} does not exist: write it with the tree to compare with.")
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    # Which tree is imported is the whole point: an installed package can hide the one meant.
    made_by = {"tree": command.__file__, "torch": torch.__version__, "transformers": transformers.__version__}
    print(made_by, flush=True)
    now = run(args)
    if args.action == "write":
        args.file.write_text(json.dumps({"made_by": made_by, "tensors": now}, indent=1) + "\n")
        return 0
    written = json.loads(args.file.read_text())
    lines = differences(written["tensors"], now)
    print(f"{len(now)} sources and conversions against {written['made_by']}")
    print("\n".join(lines) or "All tensors have the same bits.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
