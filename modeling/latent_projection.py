"""Projections, and which of them are matrices. Absorbed attention multiplies by the up-projection's matrix instead of
calling the module, so it has to know that a call would do the same to every row."""

from typing import TypeGuard

import torch
from torch import nn

from .latent_attention import multiply_heads

# Packages whose linear layers are matrices, stored in fewer bits.
QUANTISERS = ("bitsandbytes", "optimum", "torchao")


class HeadwiseLinear(nn.Module):
    """
    A matrix for each head.

    Args:
        num_heads, in_features, out_features (`int`): The weight is [num_heads, out_features, in_features].
    """

    def __init__(self, num_heads: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, heads, T, in_features] to [B, heads, T, out_features]."""
        return multiply_heads(x, self.weight.transpose(1, 2))


def is_plain(module: nn.Module) -> bool:
    """Whether `module.weight` is what the module computes with: no adapter, quantised, sharded or offloaded weight,
    or hook."""
    return (
        type(module.weight) in (nn.Parameter, torch.Tensor)
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module.weight` is the matrix, and no parametrisation either."""
    return type(module) is nn.Linear and is_plain(module)


def is_linear_map(module: nn.Module) -> bool:
    """
    Whether what a projection does to the unit vectors is what it does to every row.

    That is so for linear layers without a bias whose weights are stored in another way (quantised by bitsandbytes,
    quanto or torchao, offloaded by accelerate), and for plain LoRA over one. In doubt it is not: a `forward` of
    somebody's own may do anything, hooks may depend on the row (peft's `adapter_names`) or on the layout of the batch
    (tensor parallelism, FSDP), and so may LoRA's variants.
    """
    if is_plain_linear(module):  # what asks at every step, and of others only what it must
        return module.bias is None
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False
    if isinstance(module, nn.Linear):
        return module.bias is None and computes_as_linear(module)
    # A LoRA layer of peft, and nothing but that: no variant, no bias, no other `forward`.
    plain_lora = getattr(module, "lora_variant", None) == {} and not any(getattr(module, "lora_bias", {}).values())
    base = getattr(module, "base_layer", None)
    return plain_lora and "forward" not in module.__dict__ and isinstance(base, nn.Module) and is_linear_map(base)


def computes_as_linear(module: nn.Linear) -> bool:
    """Whether calling a linear layer is `nn.Linear`'s `forward`, or that of a library that only stores its weight in
    another way."""
    own = type(module).forward is nn.Linear.forward or type(module).__module__.split(".")[0] in QUANTISERS
    # accelerate replaces `forward` by one that brings the weights first; what hooks of others do, nobody knows.
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return own and ("forward" not in module.__dict__ or all(type(h).__name__ == "AlignDevicesHook" for h in hooks))


def as_matrix(module: nn.Module, in_features: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix [out, in] of a projection that [`is_linear_map`]. Reading `.weight` of a wrapped layer would skip its
    adapter without a word, so anything but a plain `nn.Linear` is asked what it does to the unit vectors."""
    if is_plain_linear(module):
        return module.weight
    return module(torch.eye(in_features, dtype=dtype, device=device)).T
