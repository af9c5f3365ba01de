"""Low-rank factors of the un-rotated keys and the values (MHA2MLA, arXiv 2502.14837, section 3.2)."""

import torch

METHODS = ("joint", "split", "none")


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


def factorise(
    keys: torch.Tensor, values: torch.Tensor, rank: int, method: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    One latent for the un-rotated key rows and the value rows of all heads.

    `joint`: SVD of both matrices stacked. `split`: one SVD each, with half the rank. `none`: the rows themselves are
    the latent (no compression), to look at partial RoPE alone.

    Args:
        keys (`torch.Tensor`): Un-rotated key rows of all key/value heads, [key_rows, hidden]; may have no rows.
        values (`torch.Tensor`): Value rows, [value_rows, hidden].
        rank (`int`): Latent size R; see [`max_rank`].
        method (`str`): One of "joint", "split", "none".

    Returns:
        down [R, hidden], key_up [key_rows, R], value_up [value_rows, R].
    """
    key_rows = keys.shape[0]
    if method == "none":
        up = torch.eye(rank, dtype=keys.dtype, device=keys.device)
        return torch.cat((keys, values)), up[:key_rows], up[key_rows:]
    if method == "joint":
        up, down = balanced_svd(torch.cat((keys, values)), rank)
        return down, up[:key_rows], up[key_rows:]
    if method == "split":
        half = rank // 2
        key_up, key_down = balanced_svd(keys, half)
        value_up, value_down = balanced_svd(values, half)
        down = torch.cat((key_down, value_down))
        return (
            down,
            torch.nn.functional.pad(key_up, (0, half)),
            torch.nn.functional.pad(value_up, (half, 0)),
        )
    raise ValueError(f"Unknown SVD method {method!r}; choose one of {', '.join(METHODS)}.")


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
        down [R, D], a latent with E[c c^T] = I, and decoder [D, R]: W ~ (W decoder) down.
    """
    # No key energy is left once every pair is rotated.
    rows = torch.cat([w / w.norm() for w in (keys, values) if w.norm() > 0])  # [k + v, D]
    if rows.shape[0] >= rows.shape[1]:
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -rank:]
    else:  # fewer rows than dims (GQA): the same inside the span of the rows, where it is far cheaper
        span = torch.linalg.qr(rows.T).Q  # [D, k + v]
        inside = rows @ span
        basis = span @ torch.linalg.eigh(inside.T @ inside).eigenvectors[:, -rank:]
    basis = basis.flip(-1)  # [D, R], falling energy
    down = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)  # basis^T L^-1
    return down, root @ basis


def max_rank(key_rows: int, value_rows: int, hidden_size: int, method: str) -> int:
    """The largest latent that the matrices can fill. For `none` it is also the smallest."""
    if method == "none":
        return key_rows + value_rows
    if method == "joint":
        return min(key_rows + value_rows, hidden_size)
    return 2 * min(key_rows, value_rows, hidden_size)
