"""Common frequency lists against brute force."""

from itertools import combinations, pairwise

import pytest
import torch

from mha2mla.conversion.cache_plan import runs
from mha2mla.conversion.presets.calibrated.frequency_lists import best_lists, select_listed, two_runs


def any_list(frequencies) -> bool:
    return True


def is_two_runs(chosen: tuple[int, ...]) -> bool:
    """{0..m-1}, then at most one gap, then consecutive ones."""
    gaps = [b - a for a, b in pairwise(chosen)]
    return chosen[0] == 0 and sum(gap > 1 for gap in gaps) <= 1


@pytest.mark.parametrize("num_pairs", [1, 2, 4, 7])
def test_two_runs_are_all_there_are(num_pairs):
    expected = [chosen for chosen in combinations(range(7), num_pairs) if is_two_runs(chosen)]
    lists = list(two_runs(num_pairs, 7))
    assert sorted(lists) == expected
    assert lists[0] == tuple(range(num_pairs))


def test_best_lists_leave_the_least_cost():
    cost = torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(0))  # layers, frequencies, components

    def left(chosen):
        return sum(cost[layer, f].max() for layer in range(3) for f in range(9) if f not in chosen).item()

    expected = sorted((c for c in combinations(range(9), 4) if is_two_runs(c)), key=left)
    best = best_lists(cost, 4, 5, any_list)
    assert best[:4] == expected[:4]
    assert best[4] == (expected[4] if (0, 1, 2, 3) in expected[:5] else (0, 1, 2, 3))
    assert best_lists(cost, 9, 5, any_list) == [tuple(range(9))]


def test_best_lists_are_expressible():
    cost = torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(1))
    best = best_lists(cost, 3, 4, lambda frequencies: max(frequencies) < 5)
    expected = [c for c in best_lists(cost, 3, 1000, any_list) if max(c) < 5]
    assert best[:3] == expected[:3]
    assert best_lists(cost, 3, 4, lambda frequencies: 0 not in frequencies) == []


def test_best_lists_need_as_many_frequencies():
    with pytest.raises(ValueError, match=r"10 different frequencies .* has 9"):
        best_lists(torch.zeros(3, 9, 2), 10, 5, any_list)


def test_a_layer_keeps_its_best_component():
    cost = torch.tensor([[5.0, 1.0], [0.0, 4.0], [3.0, 2.0]])  # [F, A]
    frequency, component = select_listed(cost, (0, 2, 1))
    assert (frequency.tolist(), component.tolist()) == ([[0, 2, 1]], [[0, 0, 1]])


@pytest.mark.parametrize(
    "frequencies,text", [((0, 1, 2), "0-2"), ((0, 1, 5), "0-1, 5"), ((0, 3, 4, 5), "0, 3-5"), ((0,), "0")]
)
def test_runs(frequencies, text):
    assert runs(frequencies) == text
