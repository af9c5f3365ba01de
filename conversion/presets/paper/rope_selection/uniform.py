"""`uniform`: frequencies at equal distances."""

import torch

NAME = "uniform"
NEEDS_TEXT = False


def select(num_kept: int, num_pairs: int) -> torch.Tensor:
    """floor(k * num_pairs / num_kept) for k = 0, 1, ..., num_kept - 1."""
    return torch.arange(num_kept) * num_pairs // num_kept
