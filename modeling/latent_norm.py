"""The norms of every family, in one launch where a step is neither compiled nor trained."""

import torch
from torch import nn


class FusedNormMixin:
    """
    transformers writes RMSNorm as eight operations, which a compiler fuses. Uncompiled they are a third of what a
    decoding step launches, and the step waits for the host: torch's own kernel takes their place. It rounds once, at
    the end. Goes before the family's norm.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        # With gradients the numbers stay those of transformers; of two types torch would make eight operations again.
        fused = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if fused and hidden_states.dtype == self.weight.dtype:
            normed = nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
            return normed.to(hidden_states.dtype)  # which autocast makes fp32 on a GPU
        return super().forward(hidden_states)  # type: ignore[misc]
