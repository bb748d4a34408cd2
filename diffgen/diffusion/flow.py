"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): the straight path between a picture and noise.

x_t = (1 − σ)·x0 + σ·ε with σ = t/T; the network predicts the velocity ε − x0. Times are floats, 0 … T.
"""

from __future__ import annotations

from torch import Tensor

from schedulers import NoiseSchedule


class RectifiedFlow:
    """The forward process and the training target of a flow; the same names as those of `GaussianDiffusion`."""

    prediction = "flow_prediction"

    def __init__(self, noise: NoiseSchedule) -> None:
        """Raises ValueError for a noise schedule that is no flow."""
        if not noise.is_flow:
            raise ValueError(f"a rectified flow needs the noise schedule flow, not {noise!r}")
        self.noise, self.T = noise, noise.T

    def sigma(self, t: Tensor, x0: Tensor) -> Tensor:
        """σ = t/T of times t [B], shaped to multiply x0 [B, …]."""
        return (t.to(x0.dtype) / self.T).reshape(-1, *[1] * (x0.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Rectified flow, eq. 1: x_t = (1 − σ)·x0 + σ·ε."""
        sigma = self.sigma(t, x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The velocity dx/dσ = ε − x0."""
        return noise - x0

    def weights(self, t: Tensor, x0: Tensor) -> Tensor:
        """The factors of the output's squared error: 1."""
        return x0.new_ones(len(x0), *[1] * (x0.ndim - 1))
