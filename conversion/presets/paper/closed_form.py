"""The preset `paper`: partial RoPE per key/value head, then low rank (MHA2MLA, arXiv 2502.14837)."""

import torch

from mha2mla.conversion.attention_weights import LatentAttention, SourceAttention
from mha2mla.conversion.rotary import Rotation

from .low_rank import METHODS


def pair_dims(pairs: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Dims of rotary pairs, first halves before second halves: [.., p] -> [.., 2p]."""
    return torch.cat((pairs, pairs + head_dim // 2), dim=-1)


def complement(pairs: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """Ascending pairs that are not in `pairs`, row by row: [G, p] -> [G, num_pairs - p]."""
    kept = torch.zeros(pairs.shape[0], num_pairs, dtype=torch.bool, device=pairs.device)
    kept.scatter_(1, pairs, True)
    return (~kept).nonzero()[:, 1].view(pairs.shape[0], -1)


def convert_attention(
    source: SourceAttention,
    rope_pairs: torch.Tensor,
    kv_lora_rank: int,
    svd: str,
    rotation: Rotation,
    qk_nope_head_dim: int | None = None,
) -> LatentAttention:
    """
    Convert one layer.

    Args:
        source (`SourceAttention`): H query heads, G key/value heads of d dims.
        rope_pairs (`torch.Tensor`): Pairs that keep RoPE, ascending, [G, r/2].
        kv_lora_rank (`int`): Latent size R over all heads.
        svd (`str`): Name of a method in `low_rank/`.
        rotation (`Rotation`): Which pairs turn. In a layer without RoPE the rotary keys are zero.
        qk_nope_head_dim (`int`, *optional*): Dims of an un-rotated key, of which those that are not needed are zero.
            By default as many as are needed.

    Returns:
        The layer with one rotary key and one un-rotated key per key/value head.
    """
    num_heads, head_dim, _ = source.q.shape
    num_kv_heads, rope_size = source.k.shape[0], 2 * rope_pairs.shape[1]
    kept = rope_pairs if rotation.num_turning > 0 else rope_pairs[:, :0]
    rope = pair_dims(kept, head_dim)  # [G, r], or [G, 0] without RoPE
    nope = pair_dims(complement(kept, head_dim // 2), head_dim)  # [G, d - r], or [G, d]
    nope_size = qk_nope_head_dim or nope.shape[1]
    group = torch.arange(num_heads, device=source.q.device) // (num_heads // num_kv_heads)  # [H]

    def pick(tensor: torch.Tensor, dims: torch.Tensor, size: int) -> torch.Tensor:
        """Rows of [heads, d, hidden] (or entries of [heads, d]) by head, then zeros: -> [heads, size, hidden]."""
        picked = torch.stack([head[index] for head, index in zip(tensor, dims, strict=True)])
        return torch.cat((picked, picked.new_zeros(len(picked), size - picked.shape[1], *picked.shape[2:])), dim=1)

    key_rows, value_rows = pick(source.k, nope, nope_size).flatten(0, 1), source.v.flatten(0, 1)
    if source.normalised is None:
        down, key_up, value_up = METHODS[svd].factorise(key_rows, value_rows, kv_lora_rank)
    else:
        # The weights say which directions count, and the latent is the nearest to keys and values behind the norm.
        weights = pick(source.normalised.key_weights(), nope, nope_size).flatten(0, 1)
        _, key_up, value_up = METHODS[svd].factorise(weights, source.normalised.v.flatten(0, 1), kv_lora_rank)
        down = torch.linalg.pinv(torch.cat((key_up, value_up))) @ torch.cat((key_rows, value_rows))
    scale = rotation.score_factors.to(source.q.device)  # [d]
    layer = LatentAttention(
        q_nope=pick(source.q * scale[:, None], nope[group], nope_size),
        q_rope=pick(source.q, rope[group], rope_size),
        latent=down,
        k_rope=pick(source.k, rope, rope_size),
        k_up=key_up.view(num_kv_heads, nope_size, kv_lora_rank),
        v_up=value_up.view(num_kv_heads, head_dim, kv_lora_rank),
        o=source.o,
        rope_frequencies=rope_pairs,
        normalised=source.normalised,
    )
    if source.has_bias:
        layer.o_bias = source.output_bias()
    if source.has_bias and source.normalised is None:
        # A bias of un-rotated keys adds the same number to all scores of a query: the softmax does not feel it.
        q_bias = source.q.new_zeros(num_heads, head_dim) if source.q_bias is None else source.q_bias
        k_bias = source.k.new_zeros(num_kv_heads, head_dim) if source.k_bias is None else source.k_bias
        layer.q_nope_bias = pick(q_bias * scale, nope[group], nope_size)
        layer.q_rope_bias = pick(q_bias, rope[group], rope_size)
        layer.k_rope_bias = pick(k_bias, rope, rope_size)
    return layer
