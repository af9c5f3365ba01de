"""Tokens a second of GGUF files in llama.cpp on the CPU, beside `mha2mla bench` for transformers:

    mha2mla export MODEL converted.gguf --format gguf --dtype float32
    python benchmarks/llama_cpp_speed.py original.gguf converted.gguf --contexts 128,2048,8192 --threads 2

Needs the package `xllamacpp`. Each file is served by a process of its own; files take turns, so that a machine's other
work falls on all of them; medians of the repetitions. Beside the time of a step stands the processor's time that it
took (Linux): that of all threads, which other work on the machine moves less. What the cache holds is float16,
llama.cpp's default, unless --cache-type says f32. Rows go to $OUT/llama_cpp_speed.json (or ./llama_cpp_speed.json).
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path


def serve(args: argparse.Namespace) -> None:
    """A server until the process is ended."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = str(args.files[0]), args.port
    parameters.hostnames = ["127.0.0.1"]
    parameters.n_ctx, parameters.n_parallel = max(args.contexts) + args.new + 8, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = args.threads
    kind = dict(f16=xllamacpp.ggml_type.GGML_TYPE_F16, f32=xllamacpp.ggml_type.GGML_TYPE_F32)[args.cache_type]
    parameters.cache_type_k = parameters.cache_type_v = kind
    server = xllamacpp.Server(parameters)  # noqa: F841  # lives as long as this process
    threading.Event().wait()


def ask(port: int, **body) -> dict:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", data, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=600).read())


def processor_ms(pid: int) -> float:
    """Of a process since it began, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(args: argparse.Namespace, file: Path) -> tuple[subprocess.Popen, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("threads", "new", "cache-type")]
    contexts = f"--contexts={','.join(map(str, args.contexts))}"
    command = [sys.executable, __file__, str(file), f"--port={port}", contexts, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(120):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return process, port
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(f"llama.cpp does not serve {file}.") from None
            time.sleep(0.5)
    raise RuntimeError(f"llama.cpp does not answer for {file}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--contexts", type=lambda text: [int(part) for part in text.split(",")], default="128,2048")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cache-type", choices=("f16", "f32"), default="f16")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "llama_cpp_speed.json")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # of a child process
    args = parser.parse_args()
    if args.port is not None:
        serve(args)
        return
    servers = {file: start(args, file) for file in args.files}
    rows = []
    try:
        for context in args.contexts:
            steps: dict[Path, list[float]] = {file: [] for file in args.files}
            works: dict[Path, list[float]] = {file: [] for file in args.files}
            draw = random.Random(context)
            prompt = [draw.randrange(1000, 20000) for _ in range(context)]
            body = dict(prompt=prompt, temperature=0, ignore_eos=True, cache_prompt=True)
            for _, port in servers.values():  # the prompt is read once, and cached
                ask(port, **body, n_predict=1)
            for _ in range(args.repetitions):
                for file, (process, port) in servers.items():
                    before = processor_ms(process.pid)
                    steps[file].append(ask(port, **body, n_predict=args.new)["timings"]["predicted_per_token_ms"])
                    works[file].append((processor_ms(process.pid) - before) / args.new)
            for file in args.files:
                step, work = (statistics.median(values[file]) for values in (steps, works))
                row = dict(file=file.name, context=context, threads=args.threads, step_ms=step, processor_ms=work)
                rows.append(row | dict(tokens_per_s=1e3 / step))
                print("ROW", json.dumps(rows[-1]), flush=True)
    finally:
        for process, _ in servers.values():
            process.kill()
    args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
