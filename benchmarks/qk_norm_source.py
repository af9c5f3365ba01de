"""A small model with norms on queries and keys, to convert: a Llama checkpoint as Qwen3, distilled until it speaks.

    python benchmarks/qk_norm_source.py SmolLM2-135M-Instruct qwen3-135m --data 'train-*.jsonl.gz' \\
        --eval-data validation.jsonl.gz --tokens 20e6 --compile

The dims are the original's, and so are all weights but those of queries and keys, whose rows are divided by the root
mean square of their channel, which becomes the norm's gain. Directions of queries and keys are then the original's;
what is lost is how their lengths differ, between heads and between tokens. Distillation (KL to the original's
predictions, in bf16 on a GPU) makes up for it. Needs a GPU for more than a trial.

Data are tokens (`.npy` or raw `.bin`, uint16; `.npz` of `recovery.py tokens`) or text (`.jsonl`, `.jsonl.gz`, column
`text`), of which the first `--tokens` are read.
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from dataclasses import fields
from glob import glob
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mha2mla.evaluation import measure_perplexity
from mha2mla.training.loss import token_losses
from mha2mla.training.losses.distillation import Distillation
from mha2mla.training.trainer import compile_layers


def iterate_documents(paths: list[str]) -> Iterator[str]:
    for path in paths:
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
            for line in file:
                yield json.loads(line)["text"]


def read_rows(pattern: str, tokenizer, num_tokens: int, length: int) -> np.ndarray:
    """The first `num_tokens` of files of tokens or of text, [rows, length]."""
    paths = sorted(glob(pattern))
    if not paths:
        raise ValueError(f"No file is named {pattern}.")
    readers = {
        ".npy": lambda path: np.load(path, mmap_mode="r").reshape(-1),
        ".npz": lambda path: np.load(path)["input_ids"].reshape(-1),
        ".bin": lambda path: np.memmap(path, dtype=np.uint16, mode="r"),
    }
    read = readers.get(Path(paths[0]).suffix)
    if read is not None:
        tokens = np.concatenate([read(path)[:num_tokens] for path in paths])[:num_tokens]
    else:
        pieces: list[int] = []
        for text in iterate_documents(paths):
            pieces += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            if len(pieces) >= num_tokens:
                break
        tokens = np.array(pieces[:num_tokens])
    rows = len(tokens) // length
    if rows == 0:
        raise ValueError(f"{pattern} holds {len(tokens)} tokens, less than a row of {length}.")
    return tokens[: rows * length].reshape(rows, length).astype(np.int64)


@torch.no_grad()
def channel_rms(model: PreTrainedModel, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Root mean square over tokens and heads of each channel of queries and keys, [head_dim] by projection's name."""
    projections = {n: m for n, m in model.named_modules() if n.endswith((".q_proj", ".k_proj"))}
    squares = dict.fromkeys(projections, torch.zeros((), dtype=torch.float64, device=model.device))

    def add(name: str, output: torch.Tensor) -> None:
        heads = output.unflatten(-1, (-1, model.config.head_dim)).double()
        squares[name] = squares[name] + heads.square().mean((0, 1, 2)) / len(rows)

    hooks = [m.register_forward_hook(lambda _, __, out, n=n: add(n, out)) for n, m in projections.items()]
    for row in rows:
        model.model(row[None].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: square.sqrt().float() for name, square in squares.items()}


def with_norms(original: PreTrainedModel, rows: torch.Tensor) -> Qwen3ForCausalLM:
    """The original as Qwen3, its norms put in where they change least."""
    config = original.config
    if any(getattr(config, name, False) for name in ("attention_bias", "mlp_bias")):
        raise ValueError("The original has biases on its projections, which Qwen3 has not.")
    shared = {field.name for field in fields(Qwen3Config)} - {"architectures", "layer_types"}
    values = {name: value for name, value in config.to_dict().items() if name in shared}
    model = Qwen3ForCausalLM(Qwen3Config(**values, use_sliding_window=False)).to(original.device)
    state = original.state_dict()
    for name, rms in channel_rms(original, rows).items():
        weight = state[f"{name}.weight"].unflatten(0, (-1, config.head_dim))
        state[f"{name}.weight"] = (weight / rms[:, None]).flatten(0, 1)
        state[name.replace("_proj", "_norm") + ".weight"] = rms
    model.load_state_dict(state)
    return model


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then 1 - sqrt."""
    begin = max(1, round(warmup * steps))
    return (step + 1) / begin if step < begin else 1 - math.sqrt((step - begin) / max(1, steps - begin))


def distil(student: PreTrainedModel, teacher: PreTrainedModel, rows: torch.Tensor, args: argparse.Namespace) -> None:
    """One pass over the rows."""
    device = student.device
    steps = len(rows) // args.batch
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    student.train()
    start = time.perf_counter()
    for step, chosen in enumerate(order[: steps * args.batch].view(steps, args.batch)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate_factor(step, steps, args.warmup)
        ids = rows[chosen].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                wanted = teacher.model(ids, use_cache=False).last_hidden_state
            states = student.model(ids, use_cache=False).last_hidden_state
            heads = student.lm_head, states.flatten(0, 1), ids.flatten(), teacher.lm_head, wanted.flatten(0, 1)
            (distances,) = token_losses([Distillation()], *heads, compiled=args.compile)
        loss = distances.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.log == 0 or step == steps - 1:
            rate = (step + 1) * ids.numel() / (time.perf_counter() - start)
            print(f"step {step + 1}/{steps}: KL {loss.item():.4f}, {rate:,.0f} tokens/s", flush=True)
    student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="A Llama checkpoint without biases.")
    parser.add_argument("output", type=Path, help="Folder to write.")
    parser.add_argument("--data", required=True, help="Tokens or text; a pattern names several files.")
    parser.add_argument("--eval-data", help="Likewise; by default the last rows of the data, not trained on.")
    parser.add_argument("--eval-rows", type=int, default=40)
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--batch", type=int, default=32, help="Rows a step.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a row.")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--warmup", type=float, default=0.05, help="Share of the steps with rising rate.")
    parser.add_argument("--calibration-rows", type=int, default=16, help="From which the first gains are taken.")
    parser.add_argument("--compile", action="store_true", help="Compile layers and loss.")
    parser.add_argument("--log", type=int, default=20, help="Steps between lines.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    teacher = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).to(args.device).eval()
    teacher.requires_grad_(False)
    rows = torch.from_numpy(read_rows(args.data, tokenizer, round(args.tokens), args.length))
    if args.eval_data:
        eval_tokens = args.eval_rows * args.length
        eval_rows = torch.from_numpy(read_rows(args.eval_data, tokenizer, eval_tokens, args.length))
    else:
        rows, eval_rows = rows[: -args.eval_rows], rows[-args.eval_rows :]
    student = with_norms(teacher, rows[: args.calibration_rows])
    print(f"{len(rows):,} rows of {args.length} tokens; perplexity of {len(eval_rows)} others:", flush=True)
    print(f"  original {measure_perplexity(teacher, eval_rows)}", flush=True)
    print(f"  with norms, before training {measure_perplexity(student, eval_rows)}", flush=True)
    for model in (teacher, student):
        compile_layers(model, args.compile)
    distil(student, teacher, rows, args)
    compile_layers(student, on=False)
    print(f"  with norms, distilled {measure_perplexity(student, eval_rows)}", flush=True)
    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
