"""The singular value decomposition that the low-rank methods share."""

import torch


def balanced_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Best rank-`rank` factors of a matrix, the singular values shared evenly: weight ~ up @ down.

    Args:
        weight (`torch.Tensor`): [rows, hidden].

    Returns:
        up [rows, rank] = U S^1/2 and down [rank, hidden] = S^1/2 V^T.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
