"""One rotary key for all heads: complex PCA across the key heads, frequency by frequency.

Pair i of a head, dims (i, i + d/2), is one complex number, and RoPE multiplies it by exp(j theta_i m). A complex
linear map across heads at one frequency therefore commutes with RoPE: keys k_i in C^G may be expressed in any basis,
if the queries take the inverse. In a good basis the energy lies in few components, and each component is seen by all
query heads, so that one shared rotary key does the work of several. Kept whole, the change of basis is exact.

Shape letters: H query heads, G key/value heads, F = d/2 frequencies, A components (= G), D hidden size.
"""

import torch


def to_complex(rows: torch.Tensor) -> torch.Tensor:
    """Real rows by head [..., d, D] as complex rows [..., d/2, D]."""
    real, imag = rows.chunk(2, dim=-2)
    return torch.complex(real, imag)


def to_real(rows: torch.Tensor) -> torch.Tensor:
    """Complex rows [..., n, D] as real rows [..., 2n, D], all real parts first; pair j is rows (j, j + n)."""
    return torch.cat((rows.real, rows.imag), dim=-2)


def shared_key_basis(
    k: torch.Tensor, query_power: torch.Tensor, covariance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Basis of the key heads at each frequency, in which energy, as the queries weigh it, falls fastest.

    Key head g is weighted with the square root of its queries' power, and the Hermitian matrix of weighted second
    moments is diagonalised.

    Args:
        k (`torch.Tensor`): Key projection by head, [G, d, D].
        query_power (`torch.Tensor`): E|q_{h,i}|^2, [H, F].
        covariance (`torch.Tensor`): [D, D].

    Returns:
        mix [F, G, A] and unmix [F, A, G], complex: components are unmix_i k_i, keys are mix_i times the components,
        exactly; components by falling energy.
    """
    groups = k.shape[0]
    keys = to_complex(k).transpose(0, 1)  # [F, G, D]
    power = query_power.unflatten(0, (groups, -1)).sum(1).T  # [F, G]
    if not power.any():  # queries of a layer that was pruned weigh nothing
        power = torch.ones_like(power)
    weight = power.clamp_min(1e-12 * power.max()).sqrt()
    weighted = weight[..., None] * keys
    gram = weighted @ covariance.to(keys.dtype) @ weighted.mH
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)
    return vectors / weight[..., None], vectors.mH * weight[:, None, :]


def per_head_basis(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The trivial basis: component a is key head a. What follows then keeps one rotary key per key/value head."""
    groups, dim, _ = k.shape
    unit = torch.eye(groups, dtype=torch.complex(k[0, 0, 0], k[0, 0, 0]).dtype, device=k.device)
    unit = unit.expand(dim // 2, groups, groups)
    return unit, unit


def components(k: torch.Tensor, unmix: torch.Tensor) -> torch.Tensor:
    """Complex rows of the components: keys [G, d, D] (or biases [G, d, 1]) and unmix [F, A, G] -> [A, F, D]."""
    return torch.einsum("fag,gfd->afd", unmix, to_complex(k))


def head_factors(mix: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Factor of every component in the key that query head h reads: mix [F, G, A] -> [H, F, A]."""
    return mix.transpose(0, 1).repeat_interleave(num_heads // mix.shape[1], dim=0)
