"""The families' norms: torch's kernel in uncompiled decoding, transformers' own operations wherever gradients or a
compiler need them."""

import pytest
import torch
from torch import nn
from torch.profiler import profile

from mha2mla.modeling.latent_norm import FusedNormMixin
from pico import FORMS, make_mla


def norms_of(form: str) -> list[nn.Module]:
    return [module for module in make_mla(form=form).modules() if "RMSNorm" in type(module).__name__]


def stock(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return super(FusedNormMixin, norm).forward(x)


@pytest.mark.parametrize("form", FORMS)
def test_every_norm_of_a_family_is_one_operation_without_gradients(form):
    norms = norms_of(form)
    assert norms and all(isinstance(norm, FusedNormMixin) for norm in norms)
    x = torch.randn(2, 3, *norms[0].weight.shape)
    with torch.no_grad(), profile() as profiler:
        norms[0](x)
    assert "aten::rms_norm" in {event.name for event in profiler.events()}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_familys_norm_and_rounds_no_worse(form):
    norm = norms_of(form)[0]
    nn.init.normal_(norm.weight, 1.0, 0.3)
    x = 5 * torch.randn(64, *norm.weight.shape)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), stock(norm, x))
        x, norm = x.bfloat16(), norm.bfloat16()
        exact = nn.functional.rms_norm(x.double(), norm.weight.shape, norm.weight.double(), norm.variance_epsilon)
        errors = [(made.double() - exact).norm() for made in (norm(x), stock(norm, x))]
    assert errors[0] <= 1.01 * errors[1]


def test_gradients_and_mixed_types_take_transformers_operations():
    norm = norms_of("mla_qwen3")[0]
    x = torch.randn(4, *norm.weight.shape, requires_grad=True)
    assert torch.equal(norm(x), stock(norm, x))
    with torch.no_grad():
        half = x.bfloat16()
        assert torch.equal(norm(half), stock(norm, half)) and norm(half).dtype == torch.float32


def test_autocast_on_a_gpu_leaves_the_type(monkeypatch):
    """There, not on a CPU, it makes fp32 of this operation's arguments."""
    fused = nn.functional.rms_norm
    monkeypatch.setattr(nn.functional, "rms_norm", lambda x, shape, w, eps: fused(x.float(), shape, w.float(), eps))
    norm = norms_of("shared")[0].bfloat16()
    with torch.no_grad():
        assert norm(torch.randn(2, *norm.weight.shape, dtype=torch.bfloat16)).dtype == torch.bfloat16
