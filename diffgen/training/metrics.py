"""How alike two sets of pictures are: distances between distributions that need no pretrained network.

Every function takes float tensors [N, D], a row an example, and computes in float64 where it matters. None of them is
called FID: that is the Fréchet distance in one particular network's features, on fifty thousand pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 512, seed: int = 0) -> float:
    """√ E_θ W₂²(θ·a, θ·b) over random directions θ of unit length (Rabin et al. 2011; Bonneel et al. 2015).

    In one dimension W₂ is the distance of the sorted values, for sets of different sizes of their quantiles. Divided by
    √D it would be per element; it is not. 0 for equal sets. `a` and `b` are [N, D] and [M, D].
    """
    a, b = _checked(a, b)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    one, other = ((x @ directions).sort(dim=0).values for x in (a, b))
    if len(one) != len(other):
        count = max(len(one), len(other))
        at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        one, other = (torch.quantile(x, at, dim=0, interpolation="nearest") for x in (one, other))
    return float((one - other).square().mean().sqrt())


def frechet(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½): squared W₂ of two Gaussians (Dowson and Landau 1982)."""
    a, b = _checked(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError("the Fréchet distance needs at least two examples of each")
    sa, sb = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    root = _root(sa)
    cross = torch.linalg.eigvalsh(root @ sb @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float((gap + sa.trace() + sb.trace() - 2 * cross).clamp_min(0))


def nearest_neighbour_accuracy(a: Tensor, b: Tensor) -> float:
    """How often an example's nearest neighbour among all others is of its own set (Lopez-Paz and Oquab 2017).

    0.5: the sets cannot be told apart; 1: they can, always; below 0.5: one copies the other. The larger set is cut to
    the length of the smaller, so that chance is one half.
    """
    a, b = _checked(a, b)
    n = min(len(a), len(b))
    if n < 2:
        raise ValueError("nearest neighbours need at least two examples of each")
    both = torch.cat([a[:n], b[:n]])
    distance = torch.cdist(both, both).fill_diagonal_(torch.inf)
    mine = torch.arange(2 * n) < n
    return float((mine[distance.argmin(1)] == mine).double().mean())


def density_and_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Naeem et al. 2020, eq. 4 and 5: (density, coverage) by balls that reach to each real example's k-th neighbour.

    Density: how many balls a fake lies in, over k; 1 is what real ones reach. Coverage: the part of the balls that hold
    a fake.
    """
    real, fake = _checked(real, fake)
    if len(real) <= k:
        raise ValueError(f"density and coverage need more than {k} real examples, there are {len(real)}")
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest of all is the example itself
    inside = torch.cdist(real, fake) < radius[:, None]
    return float(inside.double().sum(0).mean() / k), float(inside.any(1).double().mean())


def memorisation_ratio(samples: Tensor, train: Tensor, test: Tensor) -> float:
    """Median distance from a sample to its nearest training example, over the same from held-out data.

    About 1: samples are as far from the training data as new data are; towards 0: they copy it.
    """
    samples, train = _checked(samples, train)
    test, train = _checked(test, train)
    near, far = (torch.cdist(x, train).min(1).values.median() for x in (samples, test))
    return float(near / far)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"expected [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    return a.double(), b.double()
