"""Which rotary pairs of a head keep RoPE: the four rules of the paper (MHA2MLA, arXiv 2502.14837, section 3.1).

Pair i of a head is the dims (i, i + d/2); its frequency falls with i.
"""

import torch

RULES = ("2-norm", "uniform", "high", "low")


def select_by_position(rule: str, num_kept: int, num_pairs: int) -> torch.Tensor:
    """
    The rules that look at nothing but the frequency's place.

    `high`: the first pairs; `low`: the last; `uniform`: floor(k * num_pairs / num_kept) for k = 0, 1, ...

    Args:
        rule (`str`): One of "high", "low", "uniform".
        num_kept (`int`): Pairs that keep RoPE, the paper's r.
        num_pairs (`int`): Pairs of a head, d/2.

    Returns:
        Ascending pair indices, [num_kept].
    """
    k = torch.arange(num_kept)
    if rule == "high":
        return k
    if rule == "low":
        return num_pairs - num_kept + k
    if rule == "uniform":
        return k * num_pairs // num_kept
    raise ValueError(f"Unknown rope selection {rule!r}; choose one of {', '.join(RULES)}.")


def select_by_score(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    The `num_kept` pairs of highest score of each key/value head, ascending.

    Args:
        scores (`torch.Tensor`): [G, d/2].

    Returns:
        Pair indices [G, num_kept].
    """
    return scores.topk(num_kept, dim=-1).indices.sort(dim=-1).values


def pair_norms(x: torch.Tensor) -> torch.Tensor:
    """Length of each rotary pair: [..., d] -> [..., d/2]. RoPE does not change it."""
    first, second = x.chunk(2, dim=-1)
    return (first.square() + second.square()).sqrt()


def two_norm_scores(query_norms: torch.Tensor, key_norms: torch.Tensor) -> torch.Tensor:
    """
    The paper's 2-norm score: what a pair can contribute to a logit at most (Cauchy-Schwarz), on average over all
    pairs of tokens, averaged over the query heads that share a key head.

    The mean of |q_m| |k_n| over all (m, n) is the product of the two means.

    Args:
        query_norms (`torch.Tensor`): Mean length of each pair over tokens, [H, d/2].
        key_norms (`torch.Tensor`): Likewise, [G, d/2].

    Returns:
        Scores [G, d/2].
    """
    num_kv_heads = key_norms.shape[0]
    return query_norms.unflatten(0, (num_kv_heads, -1)).mean(dim=1) * key_norms
