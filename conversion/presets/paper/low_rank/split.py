"""`split`: an SVD of the keys and one of the values, each with half of the latent."""

import torch
from torch.nn.functional import pad

from mha2mla.conversion.presets.paper.svd import balanced_svd

NAME = "split"


def ranks(key_rows: int, value_rows: int, hidden_size: int) -> range:
    return range(2, 2 * min(key_rows, value_rows, hidden_size) + 1, 2)


def factorise(keys: torch.Tensor, values: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    half = rank // 2
    key_up, key_down = balanced_svd(keys, half)
    value_up, value_down = balanced_svd(values, half)
    return torch.cat((key_down, value_down)), pad(key_up, (0, half)), pad(value_up, (half, 0))
