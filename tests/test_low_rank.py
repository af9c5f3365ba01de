import pytest
import torch

from mha2mla.conversion.presets.paper.low_rank import METHODS, joint, split
from mha2mla.conversion.presets.paper.svd import balanced_svd


@pytest.fixture
def matrices():
    torch.manual_seed(0)
    return torch.randn(6, 16), torch.randn(10, 16)


def test_balanced_svd_is_the_best_approximation_with_singular_values_shared_evenly(matrices):
    weight = torch.cat(matrices)
    up, down = balanced_svd(weight, 5)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - up @ down).norm(), singular[5:].norm())  # Eckart-Young
    torch.testing.assert_close(up.norm(dim=0), singular[:5].sqrt())
    torch.testing.assert_close(down.norm(dim=1), singular[:5].sqrt())


def test_joint_shares_the_latent(matrices):
    keys, values = matrices
    down, key_up, value_up = joint.factorise(keys, values, 5)
    up, expected_down = balanced_svd(torch.cat(matrices), 5)
    torch.testing.assert_close(torch.cat((key_up, value_up)) @ down, up @ expected_down)


def test_split_gives_half_the_rank_to_each(matrices):
    keys, values = matrices
    down, key_up, value_up = split.factorise(keys, values, 6)
    assert down.shape == (6, 16)
    for weight, up in ((keys, key_up), (values, value_up)):
        best_up, best_down = balanced_svd(weight, 3)
        torch.testing.assert_close(up @ down, best_up @ best_down)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_exact(matrices, method):
    keys, values = matrices
    rank = METHODS[method].ranks(6, 10, 16)[-1]
    if method == "split":
        keys = values[:10] @ torch.randn(16, 16)  # as many rows as the values: rank 20 covers both
        rank = METHODS[method].ranks(10, 10, 16)[-1]
    down, key_up, value_up = METHODS[method].factorise(keys, values, rank)
    torch.testing.assert_close(key_up @ down, keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value_up @ down, values, rtol=1e-4, atol=1e-4)
