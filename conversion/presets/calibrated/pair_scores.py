"""What it costs to take RoPE from a pair, and the mean rotation that repairs most of it.

The score that query head h gives a key at distance D = m - n through pair (frequency i, component a) is
Re(z e^{-j theta_i D}) with z = factor * conj(q_m) * key_n. Without RoPE, and with the query multiplied by a complex
number c, it is Re(conj(c) z). The cost of the pair is the squared difference over all pairs of tokens, weighted by
p (1 - p), p being the attention probability: how much the softmax feels a change of the score. It is quadratic in c,
so the best c and the cost that remains follow from five sums, in which query and key separate: tokens x tokens x
pairs is never formed.

Shape letters: H query heads, T tokens, F frequencies, A components.
"""

from dataclasses import dataclass, fields

import torch

RECEIVED_FLOOR = 0.1


@dataclass
class PairMoments:
    """
    Sums over query positions m, key positions n <= m and blocks of text, each [H, F, A], for z = conj(q_m) key_n.

    Attributes:
        s0: sum of w |z|^2 (real).
        s1: sum of w |z|^2 e^{-j theta D}.
        t0, t1, t2: sums of w z^2, w z^2 e^{-j theta D}, w z^2 e^{-2j theta D}.
    """

    s0: torch.Tensor
    s1: torch.Tensor
    t0: torch.Tensor
    t1: torch.Tensor
    t2: torch.Tensor

    def __add__(self, other: "PairMoments") -> "PairMoments":
        return PairMoments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def double(self) -> "PairMoments":
        return PairMoments(self.s0.double(), *(t.to(torch.complex128) for t in (self.s1, self.t0, self.t1, self.t2)))


def attention_probabilities(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal probabilities from rotated queries [H, T, d] and keys [G, T, d]: [H, T, T] (query, key)."""
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    scores = queries @ keys.transpose(-1, -2) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill_(future, float("-inf")).softmax(-1)


def softmax_weight(probabilities: torch.Tensor) -> torch.Tensor:
    """How much the softmax feels a change of each score, p (1 - p)."""
    return probabilities * (1 - probabilities)


def received_attention(probabilities: torch.Tensor) -> torch.Tensor:
    """
    Weight of each token as a key and value: the attention it receives over heads and queries, mean one, and a floor
    so that a token nobody attends to still counts. Attention sinks are one token in a thousand and read by all.

    Args:
        probabilities (`torch.Tensor`): [H, T, T] (query, key).

    Returns:
        [T].
    """
    received = probabilities.sum((0, 1))
    return received / received.mean() + RECEIVED_FLOOR


def pair_moments(
    queries: torch.Tensor, keys: torch.Tensor, weight: torch.Tensor, frequencies: torch.Tensor
) -> PairMoments:
    """
    The sums for one block of text, one [T, T] x [T, 10 F] product a head.

    Args:
        queries (`torch.Tensor`): Before rotation, complex [H, T, F].
        keys (`torch.Tensor`): Components before rotation, complex [A, T, F].
        weight (`torch.Tensor`): Weight of each score, [H, T, T] (query, key), zero above the diagonal.
        frequencies (`torch.Tensor`): theta, radians per position, [F].
    """
    num_heads, length, num_pairs = queries.shape
    angle = torch.arange(length, device=queries.device)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angle), angle)  # e^{j theta m}, [T, F]
    magnitude, square = queries.abs().square(), queries.conj().square()
    columns = (magnitude + 0j, magnitude * turn.conj(), square, square * turn.conj(), square * turn.conj().square())
    stacked = torch.view_as_real(torch.cat(columns, dim=-1)).flatten(-2)  # [H, T, 10 F]
    summed = (weight.transpose(-1, -2) @ stacked).view(num_heads, length, 5 * num_pairs, 2)
    left = torch.view_as_complex(summed).split(num_pairs, dim=-1)
    magnitude, square = keys.abs().square(), keys.square()
    right = (magnitude + 0j, magnitude * turn, square, square * turn, square * turn.square())
    sums = [torch.einsum("hnf,anf->hfa", a, b) for a, b in zip(left, right, strict=True)]
    return PairMoments(sums[0].real, *sums[1:])


def mean_rotation(
    moments: PairMoments, factors: torch.Tensor, ridge: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best factor on the query of a pair without RoPE, and the cost that remains.

    Minimises sum w (Re(z e^{-j theta D}) - Re(conj(c) z))^2 + ridge * sum w |z|^2 / 2 * |c|^2: two real unknowns.

    Args:
        moments (`PairMoments`): Of conj(q) times the component.
        factors (`torch.Tensor`): Factor of the component in the head's key, complex [H, F, A].
        ridge (`float`): Pulls c of a pair that says little towards 0.

    Returns:
        c [H, F, A], complex, and the cost without the ridge's term [H, F, A].
    """
    magnitude, square = factors.abs().square(), factors.square()
    s0, s1 = moments.s0 * magnitude, moments.s1 * magnitude
    t0, t1, t2 = moments.t0 * square, moments.t1 * square, moments.t2 * square
    # With z = x + j y and f = Re(z e^{-j theta D}): sums of w x^2, w y^2, w x y, w f x, w f y, w f^2.
    xx, yy, xy = (s0 + t0.real) / 2, (s0 - t0.real) / 2, t0.imag / 2
    fx, fy, ff = (t1.real + s1.real) / 2, (t1.imag - s1.imag) / 2, (s0 + t2.real) / 2
    dxx, dyy = xx + ridge * s0 / 2, yy + ridge * s0 / 2
    determinant = (dxx * dyy - xy.square()).clamp_min(torch.finfo(s0.dtype).tiny)
    a, b = (dyy * fx - xy * fy) / determinant, (dxx * fy - xy * fx) / determinant
    cost = ff - 2 * (a * fx + b * fy) + a.square() * xx + 2 * a * b * xy + b.square() * yy
    return torch.complex(a, b), cost


def score_energy(moments: PairMoments, factors: torch.Tensor) -> torch.Tensor:
    """Weighted square of each pair's own score, sum of w Re(z e^{-j theta D})^2: [H, F, A]."""
    return (moments.s0 * factors.abs().square() + (moments.t2 * factors.square()).real) / 2


def select_shared(cost: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_kept` most costly pairs of cost [F, A]: frequency and component of each, [1, num_kept] both, ordered by
    frequency."""
    chosen = cost.flatten().topk(num_kept).indices.sort().values[None]
    return chosen // cost.shape[1], chosen % cost.shape[1]


def select_per_head(cost: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_kept` most costly pairs of each component of cost [F, A], [A, num_kept] both, ordered by frequency."""
    frequency = cost.topk(num_kept, dim=0).indices.sort(dim=0).values.T
    return frequency, torch.arange(cost.shape[1], device=cost.device)[:, None].expand_as(frequency)
