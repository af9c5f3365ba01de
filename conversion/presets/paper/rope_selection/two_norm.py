"""`2-norm`: the pairs that can contribute most to the scores."""

import torch

from mha2mla.conversion.rotary import highest_pairs

NAME = "2-norm"
NEEDS_TEXT = True


def scores(query_norms: torch.Tensor, key_norms: torch.Tensor) -> torch.Tensor:
    """
    What a pair can contribute to a logit at most (Cauchy-Schwarz), on average over all pairs of tokens, averaged over
    the query heads that share a key head.

    The mean of |q_m| |k_n| over all (m, n) is the product of the two means.

    Args:
        query_norms (`torch.Tensor`): Mean length of each pair over tokens, [H, d/2].
        key_norms (`torch.Tensor`): Likewise, [G, d/2].

    Returns:
        Scores [G, d/2].
    """
    num_kv_heads = key_norms.shape[0]
    return query_norms.unflatten(0, (num_kv_heads, -1)).mean(dim=1) * key_norms


def select(num_kept: int, query_norms: torch.Tensor, key_norms: torch.Tensor) -> torch.Tensor:
    """The `num_kept` pairs of highest score of each key/value head."""
    return highest_pairs(scores(query_norms, key_norms), num_kept)
