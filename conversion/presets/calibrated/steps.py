"""The ideas of the preset as functions, so that `benchmarks/conversion_ablation.py` can do without one of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .low_rank import joint_low_rank
from .pair_scores import mean_rotation, received_attention, softmax_weight
from .refine import refine_layer


class Steps(NamedTuple):
    """
    Attributes:
        score_weight (`Callable`): See [`softmax_weight`].
        token_weight (`Callable`): See [`received_attention`].
        mean_rotation (`Callable`): See [`mean_rotation`].
        low_rank (`Callable`): See [`joint_low_rank`].
        refine (`Callable`): See [`refine_layer`].
    """

    score_weight: Callable[[torch.Tensor], torch.Tensor] = softmax_weight
    token_weight: Callable[[torch.Tensor], torch.Tensor] = received_attention
    mean_rotation: Callable[..., tuple[torch.Tensor, torch.Tensor]] = mean_rotation
    low_rank: Callable[..., tuple[torch.Tensor, torch.Tensor]] = joint_low_rank
    refine: Callable = refine_layer


DEFAULT_STEPS = Steps()
