"""What to cache of keys that are normalised: a latent behind the norm, or one of hidden states and the norm's factor.

    python benchmarks/qk_norm_cache.py qwen3-135m --data 'train-00000-of-00004.jsonl.gz' --ranks 80 48 32

Behind the norm, R numbers are a linear map of normalised keys and values. The alternative (arXiv 2606.16310) takes the
latent from hidden states, in R - G numbers, and caches the inverse root mean square of each of the G keys beside it.
Both are fitted, by the same closed form, on two thirds of the tokens, and measured on the others: the shares of energy
of all keys, as queries weigh their channels, and of all values that are lost, averaged over layers. RoPE is left out.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from mha2mla.common.text import load_blocks
from mha2mla.conversion.architectures import architecture_of
from mha2mla.conversion.attention_weights import NormalisedHeads, SourceAttention, project
from mha2mla.conversion.presets.calibrated.closed_form import SHRINKAGE, shrink
from mha2mla.conversion.presets.calibrated.low_rank import joint_low_rank


def root_of(inputs: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of the second moment of inputs [T, D]."""
    return torch.linalg.cholesky(shrink(inputs.T @ inputs / len(inputs), SHRINKAGE))


def inverse_rms(heads: NormalisedHeads, x: torch.Tensor) -> torch.Tensor:
    """Of each key before its norm, [T, G]."""
    return (project(x, heads.k, heads.k_bias).square().mean(-1) + heads.eps).rsqrt().T


def lost(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return ((got - wanted).square().sum() / wanted.square().sum()).item()


def compare(source: SourceAttention, x: torch.Tensor, rank: int) -> list[float]:
    """Shares of keys and values that a latent behind the norm loses, then those that the alternative loses."""
    heads = source.normalised
    assert heads is not None and heads.k_gain.dim() == 1, "a norm of all heads has one factor a token"
    groups, dim, _ = source.k.shape
    size, split = groups * dim, 2 * len(x) // 3
    inputs = source.inputs(x).double()
    power = source.queries(x[:split]).square().mean(1)  # [H, d]
    reach = power.unflatten(0, (groups, -1)).sum(1).sqrt().flatten().double()  # [G * d]
    (fit, test), (x_fit, x_test) = inputs.split([split, len(x) - split]), x.double().split([split, len(x) - split])
    wanted = test[:, :size] * reach, test[:, size:]

    root, unit = root_of(fit), torch.eye(2 * size, dtype=fit.dtype, device=fit.device)
    down, decoder = joint_low_rank(reach[:, None] * unit[:size] @ root, unit[size:] @ root, root, rank)
    found = test @ down.T @ decoder.T
    behind = [lost(wanted[0], found[:, :size] * reach), lost(wanted[1], found[:, size:])]

    root, keys, values = root_of(x_fit), (heads.k * heads.k_gain[:, None]).double(), heads.v.flatten(0, 1).double()
    typical = inverse_rms(heads, x[:split]).square().mean(0).sqrt().double()  # [G]
    rows = reach[:, None] * (keys * typical[:, None, None]).flatten(0, 1)
    down, decoder = joint_low_rank(rows @ root, values @ root, root, rank - groups)
    latent = x_test @ down.T
    scaled = (latent @ (keys.flatten(0, 1) @ decoder).T).unflatten(-1, (groups, dim))
    scaled = (scaled * inverse_rms(heads, x[split:])[..., None]).flatten(1)
    return [*behind, lost(wanted[0], scaled * reach), lost(wanted[1], latent @ (values @ decoder).T)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A Qwen3 checkpoint.")
    parser.add_argument("--data", required=True, help="Text, as `mha2mla convert` takes it.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[80, 48, 32])
    parser.add_argument("--blocks", type=int, default=24, help="Of 512 tokens.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    architecture = architecture_of(model.config)
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, inputs in zip(model.model.layers, seen, strict=True):
        layer.self_attn.k_proj.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0][0]))
    for block in load_blocks(args.model, args.data, args.blocks, 512):
        model.model(block[None].to(args.device), use_cache=False)
    print("| rank | keys, values lost behind the norm | with factors cached | layers where factors lose less |")
    print("|---|---|---|---|")
    for rank in args.ranks:
        rows = [
            compare(architecture.layer_attention(layer), torch.cat(inputs), rank)
            for layer, inputs in zip(model.model.layers, seen, strict=True)
        ]
        means = torch.tensor(rows).mean(0).tolist()
        better = sum(row[2] + row[3] < row[0] + row[1] for row in rows)
        shares = " | ".join(f"{means[i]:.4f}, {means[i + 1]:.4f}" for i in (0, 2))
        print(f"| {rank} | {shares} | {better} of {len(rows)} |", flush=True)


if __name__ == "__main__":
    main()
