"""`low`: the lowest frequencies."""

import torch

NAME = "low"
NEEDS_TEXT = False


def select(num_kept: int, num_pairs: int) -> torch.Tensor:
    """The last `num_kept` of `num_pairs` pairs."""
    return num_pairs - num_kept + torch.arange(num_kept)
