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


def max_rank(key_rows: int, value_rows: int, hidden_size: int, method: str) -> int:
    """The largest latent that the matrices can fill. For `none` it is also the smallest."""
    if method == "none":
        return key_rows + value_rows
    if method == "joint":
        return min(key_rows + value_rows, hidden_size)
    return 2 * min(key_rows, value_rows, hidden_size)
