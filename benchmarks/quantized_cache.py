"""Perplexity and bytes of a quantised latent cache against the same model's cache in full precision.

Every block goes through the cache in pieces of `--piece` tokens, so that all but the newest tokens are read quantised.

    python benchmarks/quantized_cache.py MODEL --text texts.jsonl --field raw --blocks 4 --length 512
"""

import argparse
import json
import math
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mha2mla.modeling import CACHE_ARGUMENT, cache_nbytes, quantized_cache

SETTINGS: list[dict] = [
    dict(nbits=8),
    dict(backend="fp8"),
    dict(nbits=4),
    dict(nbits=4, residual_length=8),
    dict(nbits=4, residual_length=64),
    dict(nbits=4, q_group_size=20),
]


@torch.no_grad()
def log_probabilities(model, blocks: torch.Tensor, cache, piece: int) -> torch.Tensor:
    """[blocks, length - 1, vocabulary], of the tokens behind the first."""
    made = [model(part, **{CACHE_ARGUMENT: cache}).logits.log_softmax(-1) for part in blocks.split(piece, dim=1)]
    return torch.cat(made, dim=1)[:, :-1]


def full_precision(layer) -> list[torch.Tensor]:
    """What a quantised layer holds as numbers, dynamic or static."""
    return [getattr(layer, name) for name in ("first", "recent", "window", "mean") if hasattr(layer, name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="a .jsonl file")
    parser.add_argument("--field", default="text")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--piece", type=int, default=8, help="tokens that go through the model at once")
    parser.add_argument("--static", action="store_true", help="caches of a fixed size, with their own window")
    parser.add_argument("--original-numbers", type=int, default=0, help="cached per token and layer by the original")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    wanted, ids = arguments.blocks * arguments.length, []
    with open(arguments.text) as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)[arguments.field] + "\n\n")["input_ids"]
            if len(ids) >= wanted:
                break
    blocks = torch.tensor(ids[:wanted]).view(arguments.blocks, arguments.length)
    targets = blocks[:, 1:, None]

    def loss(log_probability: torch.Tensor) -> float:
        return -log_probability.gather(-1, targets).mean().item()

    cache = DynamicCache(config=model.config)
    exact = log_probabilities(model, blocks, cache, arguments.piece)
    print(
        f"{'cache':42} perplexity  ratio   KL      bytes a token and layer of the last block, of the original's bf16"
    )
    numbers = model.config.latent_cache_dim
    print(f"{'full precision':42} {math.exp(loss(exact)):10.3f}  1.0000  0.0000  {2 * numbers:.1f} (bf16)")
    for settings in SETTINGS:
        started = time.perf_counter()
        cache = quantized_cache(model, max_cache_len=arguments.length if arguments.static else None, **settings)
        got = log_probabilities(model, blocks, cache, arguments.piece)
        divergence = (exact.exp() * (exact - got)).sum(-1).mean().item()
        # The tokens in full precision are fp32 here; a model in bf16 would hold half of that.
        halves = 2 * sum(held.numel() for layer in cache.layers for held in full_precision(layer))
        per_token = (cache_nbytes(cache) - halves) / blocks.numel() / len(cache.layers)
        share = f", {per_token / arguments.original_numbers / 2:.2%}" if arguments.original_numbers else ""
        print(
            f"{settings!s:42} {math.exp(loss(got)):10.3f}  {math.exp(loss(got) - loss(exact)):.4f}  {divergence:.4f}  "
            f"{per_token:.1f}{share}  [{time.perf_counter() - started:.0f} s]",
            flush=True,
        )


if __name__ == "__main__":
    main()
