"""Data with an exact denoiser: every pixel is N(m, s²), independent of the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffgen.diffusion import GaussianDiffusion
from schedulers.noise import Point
from schedulers.prediction import target


def marginal(d: GaussianDiffusion, s: float) -> Tensor:
    """[T] Var(x_t) = α²s² + σ²."""
    return d.alpha**2 * s**2 + d.sigma**2


def spread(d: GaussianDiffusion, s: float) -> Tensor:
    """[T] Var(x_0 | x_t) = s²σ²/(α²s² + σ²): the error of the best denoiser."""
    return s**2 * d.sigma**2 / marginal(d, s)


def reverse_variance(d: GaussianDiffusion, s: float) -> Tensor:
    """[T] Var(x_{t-1} | x_t), by x_{t-1} = √(1−β)·V_{t-1}/V_t·x_t + …; at t = 0 that is Var(x_0 | x_t)."""
    before = d.alpha_bar_before * s**2 + 1 - d.alpha_bar_before
    return before - (1 - d.beta) * before**2 / marginal(d, s)


def exact(d: GaussianDiffusion, m: float, s: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The best network for this data: E[x_0 | x_t] in terms of `d.prediction`; the true variance if it is learned."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = d.alpha[t].reshape(shape), d.sigma[t].reshape(shape)
        x0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * m)
        output = target(d.prediction, Point(t, alpha, sigma), x0, (x - alpha * x0) / sigma)
        if d.variance == "learned_range":
            width = d.log_beta - d.log_beta_tilde  # 0 if there is only one step
            f = (reverse_variance(d, s).log() - d.log_beta_tilde) / width.where(width > 0, 1.0)
            output = torch.cat([output, (2 * f - 1)[t].reshape(shape).expand_as(x)], dim=1)
        return output.to(x.dtype)

    return model
