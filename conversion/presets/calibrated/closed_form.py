"""The preset `calibrated`: MLA weights in closed form from statistics of calibration text.

Four ideas, none of which costs anything at inference: a shared rotary key by complex PCA (`shared_key.py`), RoPE kept
where its loss would change the attention most, the mean rotation absorbed where it goes (`pair_scores.py`), and one
low rank for un-rotated keys and values in the metric of the data (`low_rank.py`).

Shape letters: H query heads, G key/value heads, d head size, F = d/2 frequencies, A components, D size of what keys
and values are linear in (the hidden states, or, behind norms, all keys and values themselves),
n rotary keys, r rotary dims of each, R latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from mha2mla.conversion.attention_weights import LatentAttention, SourceAttention
from mha2mla.conversion.rotary import Rotation, pair_norms
from mha2mla.modeling.latent_attention import rotary_table, rotate, select_frequencies

from .frequency_lists import select_listed
from .pair_scores import (
    PairMoments,
    attention_probabilities,
    pair_moments,
    score_energy,
    select_per_head,
    select_shared,
)
from .shared_key import (
    components,
    head_factors,
    per_head_basis,
    shared_key_basis,
    to_complex,
    to_real,
)
from .steps import DEFAULT_STEPS, Steps

SHRINKAGE = 1e-3  # of the covariance towards a multiple of the identity: directions that the text hardly shows


@dataclass
class LayerStatistics:
    """
    What calibration text says about one layer; the same for every size of cache.

    Attributes:
        latent_covariance (`torch.Tensor`): Second moment of what keys and values are linear in, E[w x x^T], each token
            weighted with the attention that it receives; shrunk; [D, D].
        query_power (`torch.Tensor`): E|q_{h,i}|^2 of each pair, [H, F].
        mix, unmix (`torch.Tensor`): Basis of the rotary keys, complex [F, G, A] and [F, A, G].
        moments (`PairMoments`): Of every head and pair, each [H, F, A].
    """

    latent_covariance: torch.Tensor
    query_power: torch.Tensor
    mix: torch.Tensor
    unmix: torch.Tensor
    moments: PairMoments

    @cached_property
    def latent_root(self) -> torch.Tensor:
        """Lower Cholesky factor of `latent_covariance`."""
        return torch.linalg.cholesky(self.latent_covariance)


def collect_statistics(
    source: SourceAttention,
    attention_input: Callable[[int], torch.Tensor],
    num_blocks: int,
    num_score_blocks: int,
    frequencies: torch.Tensor,
    shared_key: bool,
    rotation: Rotation,
    steps: Steps = DEFAULT_STEPS,
) -> LayerStatistics:
    """
    Statistics of one layer over blocks of text.

    Args:
        source (`SourceAttention`): The layer's weights.
        attention_input (`Callable`): Block i's input of attention, [T, hidden]; called twice, so that one block is on
            the device at a time.
        num_blocks (`int`): Blocks of text.
        num_score_blocks (`int`): How many of them to take the pairs' statistics from.
        frequencies (`torch.Tensor`): Radians per position, 0 for pairs that stand still, [F].
        shared_key (`bool`): One rotary key for all heads, or one per key/value head.
        rotation (`Rotation`): Which pairs turn.
        steps (`Steps`): Of which the weights of scores and of tokens are used.
    """
    head_dim, size = source.k.shape[1:]
    scaling = head_dim**-0.5 * rotation.scaling**2
    still_factors = rotation.score_factors.to(source.q.device) / rotation.scaling**2  # 1 where a pair turns

    def attention_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries before rotation [H, T, d], what keys and values are linear in [T, D], and attention probabilities
        [H, T, T]."""
        q, inputs = source.queries(x), source.inputs(x)
        k = source.keys(inputs)
        angle = (torch.arange(x.shape[0], device=x.device)[:, None] * frequencies).repeat(1, 2)[None]  # [1, T, d]
        pairs = torch.arange(len(frequencies), device=x.device)[None]  # all
        cos, sin = select_frequencies(rotary_table(angle.cos(), angle.sin()), pairs)  # [1, 1, T, d]
        rotated_q, rotated_k = (rotate(heads[None], cos, sin)[0] for heads in (q, k))
        return q, inputs, attention_probabilities(rotated_q * still_factors, rotated_k, scaling)

    # Sums over many tokens lose their small eigenvalues in fp32, so they are kept in fp64.
    covariance = torch.zeros(size, size, dtype=torch.float64, device=source.q.device)
    latent_covariance = torch.zeros_like(covariance)
    query_power = torch.zeros(source.q.shape[0], head_dim // 2, dtype=torch.float64, device=source.q.device)
    for i in range(num_blocks):
        q, x, probabilities = attention_of(attention_input(i))
        weight = steps.token_weight(probabilities)
        covariance += (x.T @ x).double() / (x.shape[0] * num_blocks)
        latent_covariance += (x.T @ (weight[:, None] * x)).double() / (weight.sum() * num_blocks)
        query_power += pair_norms(q).square().mean(1) / num_blocks
    covariance, latent_covariance = shrink(covariance, SHRINKAGE), shrink(latent_covariance, SHRINKAGE)

    k64 = source.k.double()
    mix, unmix = shared_key_basis(k64, query_power, covariance) if shared_key else per_head_basis(k64)
    component_rows = components(source.k, unmix.to(torch.complex64)).flatten(0, 1)  # [A * F, D]
    component_bias = None
    if source.k_bias is not None:
        component_bias = components(source.k_bias[..., None], unmix.to(torch.complex64)).flatten()
    totals: PairMoments | None = None
    for i in range(min(num_blocks, num_score_blocks)):
        q, x, probabilities = attention_of(attention_input(i))
        keys = x.to(component_rows.dtype) @ component_rows.T
        if component_bias is not None:
            keys = keys + component_bias
        block = pair_moments(
            to_complex(q.transpose(1, 2)).transpose(1, 2),
            keys.unflatten(-1, (-1, head_dim // 2)).transpose(0, 1),
            steps.score_weight(probabilities),
            frequencies,
        ).double()  # only sums over a block are fp32
        totals = block if totals is None else totals + block
    assert totals is not None
    return LayerStatistics(latent_covariance, query_power, mix, unmix, totals)


def shrink(covariance: torch.Tensor, amount: float) -> torch.Tensor:
    """(1 - amount) C + amount * mean(diag C) * I; I where C is zero, as behind a norm whose weight is."""
    unit = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    if not covariance.any():
        return unit
    return (1 - amount) * covariance + amount * covariance.diagonal().mean() * unit


def unrotation_cost(
    statistics: LayerStatistics, num_heads: int, steps: Steps = DEFAULT_STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """What it costs to take RoPE from each pair of a layer, summed over heads, [F, A], and the energy of the layer's
    scores that this is to be compared with, above 0."""
    factors = head_factors(statistics.mix, num_heads)  # [H, F, A]
    cost = steps.mean_rotation(statistics.moments, factors)[1].sum(0)
    return cost, total_energy(statistics.moments, factors)


def total_energy(moments: PairMoments, factors: torch.Tensor) -> torch.Tensor:
    """Of all scores of a layer, to divide costs by, which are 0 too where all scores are."""
    energy = score_energy(moments, factors).sum()
    return energy.clamp_min(torch.finfo(energy.dtype).tiny)


def convert_attention(
    source: SourceAttention,
    statistics: LayerStatistics,
    qk_rope_head_dim: int,
    kv_lora_rank: int,
    shared_key: bool,
    rotation: Rotation,
    steps: Steps = DEFAULT_STEPS,
    frequency_list: tuple[int, ...] | None = None,
) -> tuple[LatentAttention, dict[str, float]]:
    """
    The layer as MLA, in closed form.

    The un-rotated query stays the original one; what is done to keys (change of basis, mean rotation, the pairs that
    went into the rotary key) lies in the per-head up-projection.

    Args:
        source (`SourceAttention`): The layer's weights.
        statistics (`LayerStatistics`): Collected with the same `shared_key`.
        qk_rope_head_dim (`int`): r, dims of one rotary key; even.
        kv_lora_rank (`int`): R.
        rotation (`Rotation`): Which pairs turn. What the rotary key has room for beyond those is zero.
        steps (`Steps`): Of which the mean rotation and the low rank are used.
        frequency_list (`tuple[int, ...]`, *optional*): The r/2 frequencies that keep RoPE, each in the layer's best
            component; by default the layer's most costly pairs keep it. For a shared key only.

    Returns:
        The layer, and what it cost by stage: `unrotation_error`, the weighted squared score error of taking RoPE from
        pairs, over the scores' energy; `key_energy_kept` and `value_energy_kept`, the shares that the latent holds.
    """
    num_heads, head_dim, _ = source.q.shape
    mix, unmix, kind = statistics.mix, statistics.unmix, statistics.latent_covariance.dtype
    factors = head_factors(mix, num_heads)  # [H, F, A]
    mean, cost = steps.mean_rotation(statistics.moments, factors)
    turning = rotation.turning.to(cost.device)  # [F]
    mean, cost = torch.where(turning[:, None], mean, 1), torch.where(turning[:, None], cost, 0)
    priority = cost.sum(0).masked_fill(~turning[:, None], -1)  # whatever turns goes before what stands still
    if frequency_list is not None:
        frequency, component = select_listed(priority, frequency_list)  # [1, r/2] both
    else:
        select = select_shared if shared_key else select_per_head
        frequency, component = select(priority, qk_rope_head_dim // 2)  # [n, r/2] both
    used = turning[frequency]  # [n, r/2]; the others are zero

    rows = components(source.k.to(kind), unmix)  # [A, F, D]
    queries = to_complex(source.q.to(kind))  # [H, F, D]
    key_of_head = torch.arange(num_heads, device=frequency.device) // (num_heads // frequency.shape[0])
    of_head, head = frequency[key_of_head], torch.arange(num_heads, device=frequency.device)[:, None]  # [H, r/2]
    into_query = (factors.conj()[head, of_head, component[key_of_head]] * used[key_of_head])[..., None]  # [H, r/2, 1]

    kept = torch.zeros(cost.shape[1:], dtype=torch.bool, device=cost.device)  # [F, A]
    kept[frequency, component] = used
    coefficients = (mean.conj() * factors).masked_fill(kept, 0)  # [H, F, A]
    key_rows = to_real(torch.einsum("hfa,afx->hfx", coefficients, rows))  # [H, d, D]
    # A component matters as much as the queries that read it: the rms of what multiplies it, over heads.
    reach = (statistics.query_power[..., None] * coefficients.abs().square()).sum(0).sqrt()  # [F, A]
    values = source.v.to(kind)
    white_rows = to_complex(to_real(rows) @ statistics.latent_root)  # [A, F, D], as maps of white inputs
    white_values = values.flatten(0, 1) @ statistics.latent_root
    down, decoder = steps.low_rank(
        to_real(reach.T[..., None] * white_rows).flatten(0, 1), white_values, statistics.latent_root, kv_lora_rank
    )
    key_up, value_up = key_rows @ decoder, values @ decoder
    scale = rotation.score_factors.to(source.q.device)  # [d]
    layer = LatentAttention(
        q_nope=source.q * scale[:, None],
        q_rope=to_real(into_query * queries[head, of_head]).to(source.q.dtype),
        latent=down.to(source.q.dtype),
        k_rope=to_real(rows[component, frequency] * used[..., None]).to(source.q.dtype),
        k_up=key_up.to(source.q.dtype),
        v_up=value_up.to(source.q.dtype),
        o=source.o,
        rope_frequencies=frequency,
        normalised=source.normalised,
    )
    if source.has_bias:
        layer.o_bias = source.output_bias()
    if source.has_bias and source.normalised is None:
        # The constant part of un-rotated keys shifts all scores of a query alike and is dropped; that of values goes
        # into the output's bias.
        q_bias = source.q.new_zeros(num_heads, head_dim) if source.q_bias is None else source.q_bias
        k_bias = source.k.new_zeros(source.k.shape[:2]) if source.k_bias is None else source.k_bias
        q_pairs = to_complex(q_bias.to(kind)[..., None])  # [H, F, 1]
        k_pairs = components(k_bias.to(kind)[..., None], unmix)  # [A, F, 1]
        layer.q_nope_bias = q_bias * scale
        layer.q_rope_bias = to_real(into_query * q_pairs[head, of_head])[..., 0].to(source.q.dtype)
        layer.k_rope_bias = to_real(k_pairs[component, frequency] * used[..., None])[..., 0].to(source.q.dtype)

    metrics = {
        "unrotation_error": (cost.masked_fill(kept, 0).sum() / total_energy(statistics.moments, factors)).item(),
        "key_energy_kept": share(key_up.square().sum(), mixed_energy(coefficients, white_rows)),
        "value_energy_kept": share(value_up.square().sum(), white_values.square().sum()),
    }
    return layer, metrics


def mixed_energy(coefficients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum over heads and pairs of |sum_a coefficients[h, f, a] rows[a, f]|^2: [H, F, A] and [A, F, D] to a number,
    without the [H, F, D] between."""
    moments = torch.einsum("afx,bfx->fab", rows, rows.conj())
    return torch.einsum("hfa,fab,hfb->", coefficients, moments, coefficients.conj()).real


def share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """part / whole; 1 where there is nothing to share."""
    return (part / whole).item() if whole > 0 else 1.0
