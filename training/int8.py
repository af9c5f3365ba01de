"""A teacher's matrices in 8 bits: half of what bfloat16 takes, on a GPU that holds the student, too."""

import torch
from torch import nn
from transformers import PreTrainedModel


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Symmetric 8-bit codes with a scale for each row.

    Args:
        weight (`torch.Tensor`): [outputs, inputs].

    Returns:
        int8 codes [outputs, inputs], and scales [outputs, 1] in the weight's type: `codes * scales` is the weight but
        for half a scale.
    """
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).to(weight.dtype)
    codes = (weight.float() / scales.float()).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear layer whose weight is made anew from its codes in every pass; it has nothing to train."""

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        codes, scales = quantize_rows(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.codes.to(self.scales.dtype) * self.scales, self.bias)


def hold_in_int8(teacher: PreTrainedModel) -> None:
    """Replace the linear layers of a model's decoder in place. Embeddings and head, often one matrix, stay as they
    are, and so do experts, which transformers does not hold in linear layers."""
    decoder = teacher.base_model
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, Int8Linear(module))
