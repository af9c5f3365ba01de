"""One list of rotary frequencies for all layers, of the kind that stock DeepSeek engines can express.

A rotary table of theta' = theta^(r/d) holds the k = r/2 highest frequencies of the source, and yarn with a step holds
two runs of consecutive ones, {0..m-1} and {o..o+n-1}. Each frequency stands in the list once, and every layer keeps
its own best component of it. Lists are ranked by the cost of un-rotating what they leave out, summed over layers,
which is cheap; the few best are to be compared by measurement.

Shape letters: F frequencies, A components, k pairs of a rotary key.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch


def two_runs(num_pairs: int, num_frequencies: int) -> Iterator[tuple[int, ...]]:
    """
    Every list of `num_pairs` distinct frequencies that is {0..m-1} and {o..o+n-1} with m >= 1 and o > m, or {0..k-1}.

    Args:
        num_pairs (`int`): k, at most `num_frequencies`.
        num_frequencies (`int`): F.

    Yields:
        Frequency indices, rising.
    """
    yield tuple(range(num_pairs))
    for first in range(1, num_pairs):
        second = num_pairs - first
        for start in range(first + 1, num_frequencies - second + 1):
            yield (*range(first), *range(start, start + second))


def best_lists(
    cost: torch.Tensor, num_pairs: int, num_best: int, expressible: Callable[[Sequence[int]], bool]
) -> list[tuple[int, ...]]:
    """
    The lists that leave the least cost un-rotated, the best first; {0..k-1} is among them if it is expressible.

    Args:
        cost (`torch.Tensor`): Cost of un-rotating each pair, summed over heads, of all layers, [L, F, A].
        num_pairs (`int`): k.
        num_best (`int`): How many to return; fewer if there are fewer.
        expressible (`Callable`): Whether the engine has a table of a list's frequencies.

    Returns:
        Lists of frequency indices; none if none is expressible.

    Raises:
        ValueError: If there are fewer frequencies than pairs.
    """
    num_frequencies = cost.shape[1]
    if num_pairs > num_frequencies:
        raise ValueError(
            f"A list of {num_pairs} different frequencies needs as many in the source, which has {num_frequencies}."
        )
    kept = cost.amax(-1).sum(0).tolist()  # [F]: by the best component of each layer
    lists = sorted(two_runs(num_pairs, num_frequencies), key=lambda chosen: -sum(kept[f] for f in chosen))
    best = list(islice(filter(expressible, lists), num_best))
    single = tuple(range(num_pairs))
    if single in best or not expressible(single):
        return best
    return [*best[: num_best - 1], single]


def select_listed(cost: torch.Tensor, frequencies: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's pairs, given the list: of each frequency the most costly component of cost [F, A]. Frequency and
    component of each pair, [1, k] both, in the order of the list."""
    frequency = torch.tensor(frequencies, device=cost.device)
    return frequency[None], cost[frequency].argmax(-1)[None]
