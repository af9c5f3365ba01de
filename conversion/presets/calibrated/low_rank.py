"""One latent for un-rotated keys and values in the metric of the data."""

import torch


def joint_low_rank(
    keys: torch.Tensor, values: torch.Tensor, root: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The latent that keeps most of un-rotated keys and values in the metric of the data.

    Inputs x of covariance C = L L^T are x = L z with white z; a map W reads W L of z. The best subspace of z is that
    of the largest eigenvectors of K^T K / tr + V^T V / tr: keys and values, which live on different scales, are given
    equal energy. The least-squares decoder of any linear map W from it is W L basis.

    Args:
        keys (`torch.Tensor`): Un-rotated keys as maps of white inputs, W_K L, each row on the scale of what it does to
            scores, [k, D].
        values (`torch.Tensor`): Values likewise, [v, D].
        root (`torch.Tensor`): Lower Cholesky factor L of the covariance, [D, D].
        rank (`int`): R, at most the smaller of k + v and D.

    Returns:
        down [R, D], a latent with E[c c^T] = I but for zero dims where there is less than R to keep, and decoder
        [D, R]: W ~ (W decoder) down.
    """
    # No key energy is left once every pair is rotated, and a layer that was pruned has none at all.
    filled = [w / w.norm() for w in (keys, values) if w.norm() > 0]
    if not filled:
        return root.new_zeros(rank, len(root)), root.new_zeros(len(root), rank)
    rows = torch.cat(filled)  # [k + v, D]
    if rows.shape[0] >= rows.shape[1]:
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -rank:]
    else:  # fewer rows than dims (GQA): the same inside the span of the rows, where it is far cheaper
        span = torch.linalg.qr(rows.T).Q  # [D, k + v]
        inside = rows @ span
        basis = span @ torch.linalg.eigh(inside.T @ inside).eigenvectors[:, -rank:]
    basis = basis.flip(-1)  # falling energy
    # A layer whose rotary key holds all of its keys may have less to keep than a layer without RoPE.
    basis = torch.nn.functional.pad(basis, (0, rank - basis.shape[1]))  # [D, R]
    down = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)  # basis^T L^-1
    return down, root @ basis
