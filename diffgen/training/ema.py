"""Averages of the weights over training, with the power function of EDM2 (Karras et al. 2024, section 3).

The average after n steps weighs step i with ∝ i^γ: it forgets the first steps, and spans a fixed fraction of the run,
however long. Its `length` is that fraction: the standard deviation of i/n under these weights. At the end, 0.10 is
about a decay of 1 − 8/n; usual lengths are 0.05 to 0.15.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .parallel import local


def exponent(length: float) -> float:
    """EDM2 eq. 126: γ of the relative length σ, the positive root of σ² = (γ + 1)/((γ + 2)²(γ + 3)).

    σ falls from 0.289 at γ = 0 as γ grows. Raises ValueError for a length that no γ > 0 has.
    """
    if not 0 < length < 12**-0.5:
        raise ValueError(f"the length of an average must lie in (0, {12**-0.5:.3f}), got {length}")
    low, high = 0.0, 2 / length
    for _ in range(200):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > length**2:
            low = middle
        else:
            high = middle
    return low


def decay(gamma: float, n: int) -> float:
    """EDM2 eq. 127: β_n = (1 − 1/n)^(γ + 1), the factor of the average at step n = 1, 2, …; β_1 is 0."""
    return (1 - 1 / n) ** (gamma + 1)


class Average:
    """One average of named parameters, in float32, updated once a step on the device."""

    def __init__(self, parameters: Mapping[str, Tensor], length: float) -> None:
        self.gamma = exponent(length)
        self.length = length
        self.sources = [local(p.detach()) for p in parameters.values()]
        self.values = [p.float().clone() for p in self.sources]

    def update(self, n: int) -> None:
        """Add the weights after step n, counted from 1."""
        torch._foreach_lerp_(self.values, self.sources, 1 - decay(self.gamma, n))
