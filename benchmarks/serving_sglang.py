"""`serving.py` and `serving_quality.py` with SGLang, which lives in an environment of its own:

    python benchmarks/serving_sglang.py --python SGLANG/bin/python                          # Llama-3-8B's dimensions
    python benchmarks/serving_sglang.py --python SGLANG/bin/python --exported MODEL --text wikitext.jsonl

The first prints tokens of cache that fit, milliseconds a decoding step and tokens a second for random weights; the
second compares perplexity, log-probs and greedy text of an exported model (`--pad 512`) with those of transformers.
Rows go to $OUT/serving_sglang.json (or ./serving_sglang.json).
"""

import argparse
import json
import os
import shlex
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from serving_quality import add_row, greedy_file, greedy_rows, prompts_of, quality, read_ids, transformers_rows

from serving import MODELS, print_table, write_config

KINDS = {"auto": "auto", "fp8": "fp8_e4m3"}  # vLLM's names of caches, and SGLang's


def run_engine(args: argparse.Namespace, kind: str, engine: dict, spec: dict) -> list[dict]:
    """What `sglang_engine.py` writes, as far as it came."""
    options = dict(
        kv_cache_dtype=KINDS[kind],
        attention_backend=args.backend,
        sampling_backend="pytorch",
        grammar_backend="none",
        dtype="bfloat16",
    )
    with TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        file = Path(folder, "spec.json")
        file.write_text(json.dumps(spec | dict(engine=options | engine, output=str(rows))))
        subprocess.run([*shlex.split(args.python), str(Path(__file__).with_name("sglang_engine.py")), str(file)])
        return json.loads(rows.read_text()) if rows.exists() else []


def run_case(args: argparse.Namespace, case: str) -> None:
    attention, kind = case.split("-")
    with TemporaryDirectory() as folder:
        write_config(Path(folder), args.model, args.layers, attention, 2 * (args.prompt + args.new))
        engine = dict(
            model_path=folder,
            load_format="dummy",
            mem_fraction_static=args.memory,
            max_running_requests=args.most_requests,
            cuda_graph_max_bs_decode=args.most_requests,
            chunked_prefill_size=args.chunk,
            disable_radix_cache=True,
            disable_prefill_cuda_graph=True,  # which SGLang has for the original only
            stream_interval=16,
        )
        vocabulary = MODELS[args.model]["vocab_size"]
        spec = dict(batches=args.batches.split(","), prompt=args.prompt, new=args.new, vocabulary=vocabulary)
        rows = run_engine(args, kind, engine, spec)
    about = dict(model=args.model, layers=args.layers, case=case, backend=args.backend)
    about["device"] = torch.cuda.get_device_name()
    for row in rows or [dict(error="no row")]:
        add_row(args.output, about | row)


def run_exported(args: argparse.Namespace) -> None:
    args.model = args.exported
    ids = read_ids(args.model, args.text, args.column, args.blocks, 2048)
    transformers_rows(args, ids)
    reference = torch.load(f"{args.output}.fp32")
    names = []
    for kind in KINDS:
        spec = dict(blocks=ids.tolist(), prompts=prompts_of(ids, args.prompts), new=args.new)
        rows = run_engine(args, kind, dict(model_path=str(args.model), mem_fraction_static=0.4), spec)
        row = dict(engine="sglang", cache=kind, backend=args.backend)
        if not rows:
            add_row(args.output, row | dict(error="no row"))
            continue
        add_row(args.output, row | quality(torch.tensor(rows[0]["logprobs"]), reference))
        names.append(f"sglang:{kind}:1")
        greedy_file(args, names[-1]).write_text(json.dumps(rows[0]["texts"]))
    greedy_rows(args, ids, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="Command of a Python that has SGLang.")
    parser.add_argument("--backend", default="fa3", help="SGLang's attention backend.")
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cases", default="gqa-auto,gqa-fp8,512-auto,512-fp8")
    parser.add_argument("--batches", default="1,48,capacity")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=16384)
    parser.add_argument("--most-requests", type=int, default=256)
    parser.add_argument("--memory", type=float, default=0.9, help="Share of the GPU's memory for weights and cache.")
    parser.add_argument("--exported", type=Path, help="A model that `mha2mla export --pad 512` wrote.")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--column", default="text")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "serving_sglang.json")
    args = parser.parse_args()
    args.dtype = "bfloat16"
    if args.exported is not None:
        run_exported(args)
        return
    for case in args.cases.split(","):
        run_case(args, case)
    rows = json.loads(args.output.read_text())
    print_table([row | dict(requests=row.get("requests", "")) for row in rows if "case" in row])


if __name__ == "__main__":
    main()
