"""What fp8 costs the entries of a latent cache, part by part, and what those entries are like.

    python benchmarks/fp8_entries.py recovered --text wikitext2_valid.jsonl:raw --device cuda

Engines round to e4m3 with a scale of 1, in the basis that the weights give. Each row is KL(model, model with rounded
entries) in nats a token, in fp32: of latents or rotary keys alone, of both times a factor (nothing may overflow or
vanish), and of latents in other bases, which an export could fold into the weights. All tokens but the first of a text
are rounded, except in the first row. What follows is a line for each layer.
"""

import argparse
import json
from collections.abc import Iterable, Iterator

import torch
from conversion_ablation import read_blocks
from pareto import Rounded, Rounding, compare, unchanged
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mha2mla.evaluation.caches import VLLM, CacheKind
from mha2mla.modeling import CACHE_ARGUMENT
from mha2mla.modeling.latent_quantization import FP8_MAX, random_rotation, round_fp8


def times(factor: float) -> Rounding:
    return lambda x: round_fp8(x * factor) / factor


def in_basis(matrix: torch.Tensor, inverse: torch.Tensor) -> Rounding:
    return lambda x: round_fp8(x @ matrix) @ inverse


def without(mean: torch.Tensor) -> Rounding:
    return lambda x: round_fp8(x - mean) + mean


def parts(rank: int, latents: Rounding, keys: Rounding) -> Rounding:
    """Of entries [..., tokens, R + n*r]."""
    return lambda x: torch.cat((latents(x[..., :rank]), keys(x[..., rank:])), dim=-1)


@torch.no_grad()
def record_entries(model: PreTrainedModel, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Entries of each layer but those of the first tokens, [blocks * (tokens - 1), W]."""
    seen: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]

    def recorder(index: int) -> Rounding:
        def record(entries: torch.Tensor) -> torch.Tensor:
            seen[index].append(entries.flatten(0, -2))
            return entries

        return record

    for block in blocks.to(model.device).split(1):
        cache = Rounded("recorded", roundings=[recorder(index) for index in range(len(seen))]).make(model)
        model(block, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    return [torch.cat(entries) for entries in seen]


def variants(model: PreTrainedModel, entries: list[torch.Tensor]) -> Iterator[CacheKind]:
    """What is rounded and how, by its name."""
    rank = model.config.kv_lora_rank
    rotation = random_rotation(rank).to(model.device)
    factors = [layer.self_attn.channel_factors(model.dtype)[0] for layer in model.base_model.layers]
    means = [layer[:, :rank].mean(0) for layer in entries]

    def alike(name: str, latents: Rounding, keys: Rounding) -> Rounded:
        return Rounded(name, roundings=[parts(rank, latents, keys)] * len(entries))

    def latents_by(name: str, roundings: Iterable[Rounding]) -> Rounded:
        return Rounded(name, roundings=[parts(rank, rounding, unchanged) for rounding in roundings])

    yield CacheKind("all", 8, VLLM)
    yield alike("all but the first token", round_fp8, round_fp8)
    for factor in (1, 1 / 16, 1 / 256):
        yield alike(f"rotary keys, times {factor:g}", unchanged, times(factor))
    for factor in (1, 16, 1 / 16):
        yield alike(f"latents, times {factor:g}", times(factor), unchanged)
    yield alike("latents, rotated", in_basis(rotation, rotation.T), unchanged)
    bases = ((factor[:, None] * rotation, rotation.T / factor) for factor in factors)
    yield latents_by("latents, in the basis of our codes", (in_basis(*basis) for basis in bases))
    yield latents_by("latents, without their mean", map(without, means))


def describe(entries: torch.Tensor, rank: int) -> dict[str, float]:
    """Of one layer's entries [tokens, W]: sizes, and how far the mean of a latent's channel exceeds its deviation."""
    latents, keys = entries[:, :rank], entries[:, rank:]
    ratio = latents.mean(0).abs() / latents.std(0)
    return {
        "latent_max": latents.abs().max().item(),
        "latent_rms": latents.square().mean().sqrt().item(),
        "mean_over_deviation": ratio.max().item(),
        "key_max": keys.abs().max().item(),
        "key_rms": keys.square().mean().sqrt().item(),
        "overflows": (entries.abs() > FP8_MAX).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A converted checkpoint.")
    parser.add_argument("--text", required=True, metavar="FILE[:FIELD]")
    parser.add_argument("--blocks", type=int, default=16, help="Of 1,024 tokens.")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    blocks = read_blocks(args.text, AutoTokenizer.from_pretrained(args.model), args.blocks)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    entries = record_entries(model, blocks)
    for kind in variants(model, entries):
        found = compare(model, model, blocks, kind, batch_size=2)
        print("{:36} {:.5f} ± {:.5f}".format(kind.name, *found["kl"]), flush=True)
    for index, layer in enumerate(entries):
        values = describe(layer, model.config.kv_lora_rank)
        print(json.dumps({"layer": index} | {name: round(value, 5) for name, value in values.items()}))


if __name__ == "__main__":
    main()
