"""Weights of our checkpoints, filled up with zeros to the sizes of kernels: the same attention.

Letters are those of `latent_shape.py`; primes for the sizes to reach, where N is H.
"""

import torch

from mha2mla.modeling import LatentShape


def grow(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """x with zeros behind, `size` long along `dim`."""
    zeros = list(x.shape)
    zeros[dim] = size - x.shape[dim]
    return torch.cat((x, x.new_zeros(zeros)), dim)


def spread_pairs(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Rotary dims, `size` of them: pair j, dims (j, j + r/2), comes to (j, j + size/2)."""
    return torch.cat([grow(half, size // 2, dim) for half in x.chunk(2, dim)], dim)


def pad_queries(rows: torch.Tensor, shape: LatentShape, target: LatentShape) -> torch.Tensor:
    """Rows that make queries, or their biases, [H * (nope + r), ...] to [H * (nope' + r'), ...]."""
    heads = rows.unflatten(0, (shape.num_attention_heads, shape.qk_head_dim))
    nope, rope = heads.split([shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=1)
    padded = (grow(nope, target.qk_nope_head_dim, 1), spread_pairs(rope, target.qk_rope_head_dim, 1))
    return torch.cat(padded, dim=1).flatten(0, 1)


def pad_headwise_queries(weight: torch.Tensor, shape: LatentShape, target: LatentShape) -> torch.Tensor:
    """The same of a matrix for each head, [H, nope + r, d] to [H, nope' + r', d]."""
    return pad_queries(weight.flatten(0, 1), shape, target).unflatten(0, (shape.num_attention_heads, -1))


def pad_entries(rows: torch.Tensor, shape: LatentShape, target: LatentShape) -> torch.Tensor:
    """Rows that make latents and rotary keys, or their biases, [R + r, ...] to [R' + r', ...]."""
    latent, rope = rows.split([shape.kv_lora_rank, shape.qk_rope_head_dim])
    return torch.cat((grow(latent, target.kv_lora_rank, 0), spread_pairs(rope, target.qk_rope_head_dim, 0)))


def pad_up_projection(weight: torch.Tensor, shape: LatentShape, target: LatentShape) -> torch.Tensor:
    """[N*nope + G*v, R] to [H * (nope' + v'), R']: for each query head its un-rotated key, then its value."""
    keys, values = (
        part.repeat_interleave(shape.num_attention_heads // part.shape[0], dim=0)
        for part in shape.split_up_projection(weight)
    )  # [H, nope, R], [H, v, R]
    heads = torch.cat((grow(keys, target.qk_nope_head_dim, 1), grow(values, target.v_head_dim, 1)), dim=1)
    return grow(heads.flatten(0, 1), target.kv_lora_rank, 1)


def pad_output(weight: torch.Tensor, shape: LatentShape, target: LatentShape) -> torch.Tensor:
    """[hidden, H * v] to [hidden, H * v']."""
    heads = weight.unflatten(1, (shape.num_attention_heads, shape.v_head_dim))
    return grow(heads, target.v_head_dim, 2).flatten(1)
