"""`joint`: one SVD of keys and values, stacked."""

import torch

from mha2mla.conversion.presets.paper.svd import balanced_svd

NAME = "joint"


def ranks(key_rows: int, value_rows: int, hidden_size: int) -> range:
    return range(1, min(key_rows + value_rows, hidden_size) + 1)


def factorise(keys: torch.Tensor, values: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    up, down = balanced_svd(torch.cat((keys, values)), rank)
    return down, up[: len(keys)], up[len(keys) :]
