"""A relative error whose few largest values do not rule its mean: what refinement and recovery bring down."""

import torch

ERROR_SCALE = 0.3  # relative squared error beyond which a token's weight falls


def robust_errors(output: torch.Tensor, wanted: torch.Tensor, scale: float = ERROR_SCALE) -> torch.Tensor:
    """
    s log(1 + e / s) of each token, e being |output - wanted|^2 / |wanted|^2: relative, as the norm that reads the
    stream next sees it, and with the weight of tokens that are lost anyway bounded.

    Args:
        output, wanted (`torch.Tensor`): [B, T, D].
        scale (`float`): s.

    Returns:
        [B, T].
    """
    error = (output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
    return scale * torch.log1p(error / scale)


def robust_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean of [`robust_errors`] over tokens."""
    return robust_errors(output, wanted).mean()
