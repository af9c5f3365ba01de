"""`none`: keys and values themselves are the latent, to look at partial RoPE alone."""

import torch

NAME = "none"


def ranks(key_rows: int, value_rows: int, hidden_size: int) -> range:
    return range(key_rows + value_rows, key_rows + value_rows + 1)


def factorise(keys: torch.Tensor, values: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    up = torch.eye(rank, dtype=keys.dtype, device=keys.device)
    return torch.cat((keys, values)), up[: len(keys)], up[len(keys) :]
