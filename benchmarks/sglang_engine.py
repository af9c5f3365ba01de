"""SGLang's side of `serving_sglang.py`, for the environment that has it (and not this package): sglang_engine.py SPEC,
a JSON file of engine options and of what to do, `output` of it the file to write."""

import asyncio
import json
import random
import sys
import time
from pathlib import Path


async def serve_one(engine, ids: list[int], new: int, start: float) -> tuple[float, float]:
    """Seconds to the first token and to the last one."""
    options = dict(max_new_tokens=new, ignore_eos=True, temperature=0.0)
    pieces = await engine.async_generate(input_ids=ids, sampling_params=options, stream=True)
    times = [time.perf_counter() - start async for _ in pieces]
    return times[0], times[-1]


def run_batch(engine, requests: int, prompt: int, new: int, vocabulary: int) -> dict:
    """Requests that arrive together. SGLang reads all prompts before it decodes: from the last first token to the end
    all decode."""
    draw = random.Random(requests)
    prompts = [[draw.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(requests)]
    start = time.perf_counter()

    async def serve_all():
        return await asyncio.gather(*(serve_one(engine, ids, new, start) for ids in prompts))

    times = engine.loop.run_until_complete(serve_all())
    first, last = max(times)  # of the request that began last
    step = (last - first) / (new - 1)
    row = dict(requests=requests, prompt=prompt, new=new, first_token_s=min(times)[0], last_first_token_s=first)
    return row | dict(step_ms=1e3 * step, tokens_per_s=requests / step)


def run_case(engine, spec: dict, emit) -> None:
    fit = engine.get_server_info()["max_total_num_tokens"]
    length = spec["prompt"] + spec["new"]
    run_batch(engine, 2, spec["prompt"], 8, spec["vocabulary"])  # warm-up
    for batch in spec["batches"]:
        requests = min(fit // length, spec["engine"]["max_running_requests"]) if batch == "capacity" else int(batch)
        row = dict(tokens_that_fit=fit, batch=batch)
        emit(row | run_batch(engine, requests, spec["prompt"], spec["new"], spec["vocabulary"]))


def run_quality(engine, spec: dict, emit) -> None:
    """Log-probs of texts and greedy tokens after prompts."""
    one = dict(max_new_tokens=1, temperature=0.0)
    answers = engine.generate(input_ids=spec["blocks"], sampling_params=one, return_logprob=True, logprob_start_len=0)
    logprobs = [[entry[0] for entry in answer["meta_info"]["input_token_logprobs"]][1:] for answer in answers]
    greedy = dict(max_new_tokens=spec["new"], temperature=0.0, ignore_eos=True)
    texts = [answer["output_ids"] for answer in engine.generate(input_ids=spec["prompts"], sampling_params=greedy)]
    emit(dict(logprobs=logprobs, texts=texts))


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    rows: list[dict] = []

    def emit(row: dict) -> None:
        rows.append(row)
        Path(spec["output"]).write_text(json.dumps(rows))

    import sglang

    start = time.perf_counter()
    engine = sglang.Engine(**spec["engine"], skip_tokenizer_init=True, log_level="info")
    print("started", time.perf_counter() - start, flush=True)
    (run_quality if "blocks" in spec else run_case)(engine, spec, emit)
    engine.shutdown()


if __name__ == "__main__":
    main()
