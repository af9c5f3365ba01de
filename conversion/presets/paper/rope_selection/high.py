"""`high`: the highest frequencies."""

import torch

NAME = "high"
NEEDS_TEXT = False


def select(num_kept: int, num_pairs: int) -> torch.Tensor:
    """The first `num_kept` of `num_pairs` pairs."""
    return torch.arange(num_kept)
