"""The gauge of a converted layer: weights of one size on both sides of what is only ever multiplied."""

from dataclasses import replace

import torch

from .attention_weights import LatentAttention

ROUNDS = 12  # of rows and columns in turn; a few suffice


def balanced(layer: LatentAttention) -> LatentAttention:
    """
    The same layer with weights that training can move: what makes and what reads each rotary pair, each dim of an
    un-rotated key or value, and each dim of the latent, has the same root mean square, within a factor of three.

    A score is a product of a query and a key, an output one of values and weights, and of such a product only the
    whole is given: any factor can go from one side to the other. The closed form and refinement leave rotary keys with
    weights tens of times as large as the queries that read them, and Adam's steps are of one size for all of them, so
    that keys hardly move. Factors are powers of two: no bit of a product changes while none leaves the range of normal
    numbers.

    What it brings to training, measured: docs/dev/training.md, "The gauge of a conversion".
    """
    n, r = layer.k_rope.shape[:2]
    num_nope, nope = layer.k_up.shape[:2]
    groups, v = layer.v_up.shape[:2]
    num_heads, rank = layer.q_nope.shape[0], layer.latent.shape[0]

    # Rotary pairs: dims j and j + r/2 turn together and share a factor.
    readers = power(layer.q_rope.unflatten(0, (n, -1)), (1, 3))  # [n, r]
    pairs = (power(layer.k_rope, (2,)), readers)  # [n, r] both
    keys, queries = (side.unflatten(1, (2, r // 2)).mean(1) for side in pairs)  # [n, r/2]
    rope = power_of_two(ratio(queries, keys)).repeat(1, 2)  # [n, r]

    # The up-projection is balanced on both sides: rows against queries and outputs, columns against the latent.
    up = torch.cat((layer.k_up.flatten(0, 1), layer.v_up.flatten(0, 1)))  # [N*nope + G*v, R]
    squares = up.float().square()
    heads = power(layer.q_nope.unflatten(0, (num_nope, -1)), (1, 3))  # [N, nope]
    outputs = power(layer.o.unflatten(1, (groups, num_heads // groups, v)), (0, 2))  # [G, v]
    row_partner, column_partner = torch.cat((heads.flatten(), outputs.flatten())), power(layer.latent, (1,))
    rows, columns = torch.ones_like(row_partner), torch.ones_like(column_partner)
    for _ in range(ROUNDS):
        rows = ratio(row_partner, (squares / columns.square()).mean(1))
        columns = ratio((squares * rows.square()[:, None]).mean(0), column_partner)
    rows, columns = power_of_two(rows), power_of_two(columns)
    of_keys, of_values = rows[: num_nope * nope].view(num_nope, nope), rows[num_nope * nope :].view(groups, v)

    per_query = of_keys.repeat_interleave(num_heads // num_nope, dim=0)  # [H, nope]
    per_output = of_values.repeat_interleave(num_heads // groups, dim=0).flatten()  # [H*v]
    per_rope_query = rope.repeat_interleave(num_heads // n, dim=0)  # [H, r]
    up = scale(up, rows[:, None] / columns)
    return replace(
        layer,
        q_nope=scale(layer.q_nope, 1 / per_query[..., None]),
        q_rope=scale(layer.q_rope, 1 / per_rope_query[..., None]),
        latent=scale(layer.latent, columns[:, None]),
        k_rope=scale(layer.k_rope, rope[..., None]),
        k_up=up[: num_nope * nope].view(num_nope, nope, rank),
        v_up=up[num_nope * nope :].view(groups, v, rank),
        o=scale(layer.o, 1 / per_output),
        q_nope_bias=None if layer.q_nope_bias is None else scale(layer.q_nope_bias, 1 / per_query),
        q_rope_bias=None if layer.q_rope_bias is None else scale(layer.q_rope_bias, 1 / per_rope_query),
        k_rope_bias=None if layer.k_rope_bias is None else scale(layer.k_rope_bias, rope),
    )


def power(weights: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Mean square over some dims."""
    return weights.float().square().mean(dims)


def ratio(reader: torch.Tensor, maker: torch.Tensor) -> torch.Tensor:
    """The factor that makes both sides, given by their mean squares, as large: it multiplies the maker and divides the
    reader. 1 where either is zero."""
    factor = (reader / maker) ** 0.25
    return torch.where((reader > 0) & (maker > 0), factor, 1)


def power_of_two(factor: torch.Tensor) -> torch.Tensor:
    """The nearest power of two."""
    return torch.exp2(factor.log2().round())


def scale(weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return weights * factor.to(weights.dtype)
