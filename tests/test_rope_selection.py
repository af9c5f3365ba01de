"""The paper's four selection rules against their definitions."""

import pytest
import torch

from mha2mla.conversion import Paper
from mha2mla.conversion.presets.paper.rope_selection import RULES, two_norm, uniform
from mha2mla.conversion.rotary import highest_pairs, pair_norms


@pytest.mark.parametrize(
    "rule, expected",
    [("high", [0, 1, 2, 3]), ("low", [28, 29, 30, 31]), ("uniform", [0, 8, 16, 24])],
)
def test_rules_by_position(rule, expected):
    assert RULES[rule].select(4, 32).tolist() == expected


def test_uniform_rounds_down_as_the_paper_does():
    # floor(k * d_h / (2 r)) for d_h = 64, r = 3
    assert uniform.select(3, 32).tolist() == [0, 10, 21]


def test_unknown_rule_names_the_choices():
    with pytest.raises(ValueError, match="'best' must be one of 2-norm, high, low, uniform"):
        Paper(rope_selection="best")


def test_two_norm_against_all_pairs_of_tokens():
    torch.manual_seed(0)
    tokens, heads, groups, dim = 7, 4, 2, 6
    q, k = torch.randn(tokens, heads, dim), torch.randn(tokens, groups, dim)
    got = two_norm.scores(pair_norms(q).mean(0), pair_norms(k).mean(0))
    for g in range(groups):
        for i in range(dim // 2):
            bounds = [
                q[m, h, [i, i + 3]].norm() * k[n, g, [i, i + 3]].norm()
                for h in (2 * g, 2 * g + 1)
                for m in range(tokens)
                for n in range(tokens)
            ]
            torch.testing.assert_close(got[g, i], torch.stack(bounds).mean())


def test_the_highest_pairs_of_each_head_ascending():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.7, 0.2, 0.6, 0.1]])
    assert highest_pairs(scores, 2).tolist() == [[1, 3], [0, 2]]
