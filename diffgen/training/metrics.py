"""The table of all metrics, and distances between two sets of pictures that need no pretrained network.

Every function takes tensors [N, D], a row an example, of any type, and computes in float64. None of them is called FID:
that is the Fréchet distance in one particular network's features, on fifty thousand pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 2**24  # numbers of a block


@dataclass(frozen=True)
class Metric:
    """How to present a metric."""

    title: str
    better: str  # "lower", "higher", or "near" a number
    short: str = ""  # a title for a narrow column; the title unless given
    unit: str = ""
    format: str = ".4g"

    @property
    def heading(self) -> str:
        """The title for a column."""
        return self.short or self.title

    def text(self, value: float) -> str:
        """The value with its unit."""
        return f"{value:{self.format}} {self.unit}".rstrip()


# Every metric of `evaluate` and `compare`, by its key in JSON, in the order in which they are listed.
METRICS = {
    "error": Metric("error", "lower"),
    "psnr": Metric("peak signal-to-noise ratio", "higher", "PSNR", "dB", ".2f"),
    "ssim": Metric("structural similarity", "higher", "SSIM"),
    "mean_error": Metric("error of the mean", "lower", "mean"),
    "covariance_error": Metric("error of the covariance", "lower", "covariance"),
    "sliced_wasserstein": Metric("sliced Wasserstein", "lower", "sliced W"),
    "frechet_distance": Metric("Fréchet distance", "lower"),
    "nearest_neighbour_accuracy": Metric("nearest-neighbour accuracy", "near 0.5"),
    "density": Metric("density", "near 1"),
    "coverage": Metric("coverage", "higher"),
    "memorisation_ratio": Metric("memorisation ratio", "near 1"),
    "classification_accuracy_score": Metric("classification accuracy score", "higher"),
    "held_out_loss": Metric("held-out loss", "lower"),
    "bits_per_dim": Metric("bits per dimension", "lower"),
    "bits_per_dim_ode": Metric("bits per dimension by the ODE", "lower"),
}


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 512, seed: int = 0) -> float:
    """√ E_θ W₂²(θ·a, θ·b) over random directions θ of unit length (Rabin et al. 2011; Bonneel et al. 2015).

    In one dimension W₂² is the integral of the squared difference of the two quantile functions. They are steps, so it
    is exact, also for sets of different sizes. 0 for equal sets. `a` and `b` are [N, D] and [M, D].
    """
    a, b = _checked(a, b)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    n, m = len(a), len(b)
    # between two neighbours of these ends, in units of 1/(n·m), both quantile functions are constant
    ends = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    width, at_a, at_b = ends.diff() / (n * m), ends[:-1] // m, ends[:-1] // n
    total = 0.0
    for part in directions.split(max(1, AT_ONCE // (n + m)), dim=1):
        # NumPy sorts a row ten times faster than torch
        one, other = (torch.from_numpy(np.sort((part.T @ x.T.cpu()).numpy())) for x in (a, b))
        total += float((width * (one[:, at_a] - other[:, at_b]).square()).sum())
    return (total / projections) ** 0.5


def frechet(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½): squared W₂ of two Gaussians (Dowson and Landau 1982).

    Small sets are farther apart than their distributions: compare only at equal N and M.
    Raises ValueError for fewer than two examples.
    """
    a, b = _checked(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError("the Fréchet distance needs at least two examples of each")
    sa, sb = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    root = _root(sa)
    cross = torch.linalg.eigvalsh(root @ sb @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float((gap + sa.trace() + sb.trace() - 2 * cross).clamp_min(0))


def nearest_neighbour_accuracy(a: Tensor, b: Tensor, *, draws: int = 10, seed: int = 0) -> float:
    """How often an example's nearest neighbour among all others is of its own set (Lopez-Paz and Oquab 2017).

    0.5: the sets are indistinguishable; 1: always distinguishable; below 0.5: one copies the other. The larger set is
    subsampled to the size of the smaller, so that chance is one half; the result is the mean of `draws` such draws.
    Among several equally near neighbours, the fraction of its own set counts.
    Raises ValueError for fewer than two examples.
    """
    a, b = _checked(a, b)
    n = min(len(a), len(b))
    if n < 2:
        raise ValueError("nearest neighbours need at least two examples of each")
    generator, total = torch.Generator().manual_seed(seed), 0.0
    draws = draws if len(a) != len(b) else 1
    own = torch.arange(2 * n) < n
    for _ in range(draws):
        both = torch.cat([x if len(x) == n else x[torch.randperm(len(x), generator=generator)[:n]] for x in (a, b)])
        for rows in torch.arange(2 * n).split(max(1, AT_ONCE // (2 * n))):
            distance = torch.cdist(both[rows], both)
            distance[torch.arange(len(rows)), rows] = torch.inf
            near = distance <= distance.min(1, keepdim=True).values
            total += float(((near & (own[rows, None] == own)).sum(1) / near.sum(1)).sum())
    return total / (2 * n * draws)


def density_and_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Naeem et al. 2020, eq. 4 and 5: (density, coverage) by balls up to each real example's k-th neighbour.

    Density: in how many balls a fake lies, over k; 1 for other real examples. Coverage: the fraction of balls with a
    fake; with N real examples and M others of the same distribution 1 − (N−1)…(N−k) / ((N+M−1)…(N+M−k)).
    Raises ValueError unless there are more than k real examples.
    """
    real, fake = _checked(real, fake)
    if len(real) <= k:
        raise ValueError(f"density and coverage need more than {k} real examples, there are {len(real)}")
    balls, covered = 0, 0
    for rows in torch.arange(len(real)).split(max(1, AT_ONCE // (len(real) + len(fake)))):
        among = torch.cdist(real[rows], real)
        among[torch.arange(len(rows)), rows] = torch.inf
        inside = torch.cdist(real[rows], fake) < among.kthvalue(k, dim=1).values[:, None]
        balls, covered = balls + int(inside.sum()), covered + int(inside.any(1).sum())
    return balls / (k * len(fake)), covered / len(real)


def nearest(x: Tensor, others: Tensor, *, leave_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(distance float64 [N], number LongTensor [N]) of the nearest of `others` [M, D] to each row of `x` [N, D].

    `leave_out` LongTensor [N] is a number that each row ignores: its own, if `others` contain x.
    """
    if x.ndim != 2 or others.ndim != 2 or x.shape[1] != others.shape[1] or not len(x) or not len(others):
        raise ValueError(f"expected [N, D] and [M, D], got {list(x.shape)} and {list(others.shape)}")
    x = x.double()
    best, number = torch.full((len(x),), torch.inf, dtype=torch.float64), torch.zeros(len(x), dtype=torch.int64)
    for first in range(0, len(others), size := max(1, AT_ONCE // max(x.shape))):
        distance = torch.cdist(x, others[first : first + size].double())
        if leave_out is not None:
            here = (leave_out >= first) & (leave_out < first + distance.shape[1])
            distance[here, leave_out[here] - first] = torch.inf
        smallest, at = distance.min(1)
        number = torch.where(smallest < best, at + first, number)
        best = torch.minimum(smallest, best)
    return best, number


def memorisation_ratio(samples: Tensor, train: Tensor, test: Tensor) -> float:
    """Median distance from a sample to its nearest training example, over the same from held-out data.

    About 1: samples are as far from the training data as new data are; towards 0: they are copies.
    Raises ValueError if half of the held-out data are in the training data.
    """
    near, far = (nearest(x, train)[0].quantile(0.5) for x in (samples, test))
    if far == 0:
        raise ValueError("most held-out examples are copies of training examples: there is no scale for new ones")
    return float(near / far)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"expected [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    return a.double(), b.double()
