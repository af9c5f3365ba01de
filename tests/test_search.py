"""Which of several measured plans is taken."""

from dataclasses import dataclass

import pytest
import torch

from mha2mla.conversion import search
from mha2mla.conversion.cache_plan import CachePlan

PLAIN, OTHER, WORSE = (CachePlan(12, 4, 1, 48, 2, frequencies) for frequencies in ((0, 1), (0, 2), (1, 2)))


@dataclass
class Job:
    blocks: torch.Tensor


@pytest.mark.parametrize(
    "losses, chosen",
    [
        ((1.0 + 0.9 * search.TIE, 1.0, 1.5), PLAIN),  # which every engine takes
        ((1.0 + 1.1 * search.TIE, 1.0, 1.5), OTHER),
        ((1.5, 1.0 + 0.5 * search.TIE, 1.0), WORSE),
    ],
)
def test_of_plans_that_the_text_cannot_tell_apart_the_plain_one_is_taken(losses, chosen, monkeypatch):
    streams = iter(losses)
    monkeypatch.setattr(search, "embed", lambda job: next(streams))
    monkeypatch.setattr(search, "run_layers", lambda *_: [])
    monkeypatch.setattr(search, "language_loss", lambda job, stream: stream)
    assert search.lowest_loss(Job(torch.zeros(6, 8)), [PLAIN, OTHER, WORSE], lambda visit: []) is chosen
