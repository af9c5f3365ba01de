"""The rotary tables of every family, made once a step in the form from which layers pick."""

import torch

from .latent_attention import rotary_table


class RotaryTableMixin:
    """Goes before the family's rotary embedding, whose `forward` gives cos and sin."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The [`rotary_table`] of all frequencies, [B, T, 4, head_dim/2], for positions [B, T]."""
        return rotary_table(*super().forward(x, position_ids))  # type: ignore[misc]
