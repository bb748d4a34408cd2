"""Models with an exact solution: a Gaussian, and a mixture of Gaussians.

For data drawn from Σ w_k·N(μ_k, s_k²·1), the state x = α·x0 + σ·ε is a mixture again, so E[x0|x] and E[ε|x] have closed
forms, for every noise schedule and at every level from the clean picture (σ = 0) to pure noise (α = 0). The
probability-flow ODE of a single Gaussian has a closed solution; that of a mixture is integrated to about 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulers.noise import CLEAN, NoiseSchedule, Point
from schedulers.prediction import target


class Mixture:
    """Data Σ w_k·N(μ_k, s_k²·1). Arithmetic is in float64; results have the dtype and the shape [B, …] of the state.

    `means` [K, D], D the number of elements of one example; `deviations` [K] or one number; `weights` [K], by default
    equal.
    """

    def __init__(self, means: Any, deviations: Any, weights: Any = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ValueError(f"means must be [components, elements], got the shape {list(self.means.shape)}")
        count = len(self.means)
        self.deviations = torch.as_tensor(deviations, dtype=torch.float64).expand(count)
        w = torch.as_tensor([1.0] * count if weights is None else weights, dtype=torch.float64)
        self.weights = w / w.sum()
        if not (self.deviations > 0).all() or not (self.weights > 0).all():
            raise ValueError("deviations and weights of a mixture must be positive")

    @classmethod
    def random(
        cls, seed: int, elements: int = 4, components: int = 6, deviation: float = 0.6, spread: float = 1.0
    ) -> Mixture:
        """Equal components with means from N(0, spread²)."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(components, elements, generator=generator, dtype=torch.float64) * spread, deviation)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Examples [count, D], float64."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.deviations[k, None] * z

    def denoise(self, x: Tensor, alpha: Any, sigma: Any) -> tuple[Tensor, Tensor]:
        """(E[x0|x], E[ε|x]) for x = α·x0 + σ·ε; alpha and sigma are numbers or tensors [B]."""
        state = x.flatten(1).double()
        a = torch.as_tensor(alpha, dtype=torch.float64, device=x.device).reshape(-1, 1, 1)
        b = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1, 1)
        means, s2 = self.means.to(x.device), (self.deviations.to(x.device) ** 2).reshape(1, -1, 1)
        variance = a * a * s2 + b * b  # of x in component k, [B or 1, K, 1]
        away = state[:, None, :] - a * means
        log_density = -0.5 * (away * away).sum(2) / variance[..., 0] - 0.5 * means.shape[-1] * variance[..., 0].log()
        share = torch.softmax(log_density + self.weights.to(x.device).log(), dim=1)[..., None]
        x0 = (share * (means + away * (a * s2 / variance))).sum(1)
        eps = (share * away * (b / variance)).sum(1)
        return x0.reshape(x.shape).to(x.dtype), eps.reshape(x.shape).to(x.dtype)

    def denoiser(self, noise: NoiseSchedule, prediction: str = "epsilon") -> Callable[[Tensor, Tensor], Tensor]:
        """The exact network for `Scheduler.sample`: a function of (x, t [B]) with the output of `prediction`."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (torch.as_tensor(level(t.double())) for level in (noise.alpha, noise.sigma))
            x0, eps = self.denoise(x, alpha, sigma)
            shape = [-1] + [1] * (x.ndim - 1)
            p = Point(t, alpha.reshape(shape), sigma.reshape(shape))
            return target(prediction, p, x0.double(), eps.double()).to(x.dtype)

        return network

    def solve(self, x: Tensor, p: Point, q: Point, intervals: int = 24) -> Tensor:
        """The state at q to which the probability-flow ODE leads from the state x at p.

        With x/√(α² + σ²) = cos θ·x0 + sin θ·ε the ODE is dx/dθ = cos θ·ε − sin θ·x0, smooth from the clean picture
        (θ = 0) to pure noise (π/2). The extrapolated midpoint rule (Gragg, Bulirsch, Stoer) solves it.
        """

        def slope(y: Tensor, theta: float) -> Tensor:
            x0, eps = self.denoise(y, math.cos(theta), math.sin(theta))
            return math.cos(theta) * eps - math.sin(theta) * x0

        start, end = math.atan2(p.sigma, p.alpha), math.atan2(q.sigma, q.alpha)
        y = x.double() / p.norm
        width = (end - start) / intervals
        for i in range(intervals):
            y = _extrapolated(slope, y, start + i * width, width)
        return (y * q.norm).to(x.dtype)


class Gaussian(Mixture):
    """Data N(mean, deviation²·1). The ODE has the solution x' = α'μ + (x − αμ)·√((α'²s² + σ'²)/(α²s² + σ²))."""

    def __init__(self, mean: Sequence[float] | Tensor, deviation: float) -> None:
        super().__init__(torch.as_tensor(mean, dtype=torch.float64)[None], deviation)

    def solve(self, x: Tensor, p: Point, q: Point, intervals: int = 0) -> Tensor:
        mean, s = self.means[0].reshape(1, *x.shape[1:]).to(x.device), float(self.deviations[0])
        stretch = math.hypot(q.alpha * s, q.sigma) / math.hypot(p.alpha * s, p.sigma)
        return (q.alpha * mean + (x.double() - p.alpha * mean) * stretch).to(x.dtype)


class Exam:
    """Several mixtures on one noise schedule: starting states, the exact network, and the solutions.

    `x` are standard normal states at the noisiest point [mixtures·starts, D], one mixture after the other; those of a
    mixture with fewer elements end in zeros. `network(x, t)` gives the output of `prediction`, and `evaluations` counts
    its calls.
    """

    def __init__(
        self,
        mixtures: Sequence[Mixture],
        noise: NoiseSchedule,
        prediction: str = "epsilon",
        starts: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.mixtures, self.noise, self.prediction, self.evaluations = mixtures, noise, prediction, 0
        self._model = _SideBySide(mixtures)
        self._used = self._model.used.repeat_interleave(starts, 0)
        first, last = noise.noisiest, noise.at(t=noise.t_min)
        z = torch.randn(self._used.shape, generator=torch.Generator().manual_seed(0)) * self._used
        self.x = z.to(dtype) * first.norm
        end = self._model.solve(self.x.double(), first, last)
        self._predicted = self._model.denoise(end, last.alpha, last.sigma)[0]
        self._clean = self._model.solve(end, last, CLEAN)

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact output for the state x [B, D]; t [B] holds one value."""
        return self.output(x, self.noise.at(t=float(t.reshape(-1)[0])))

    def output(self, x: Tensor, p: Point) -> Tensor:
        """The exact output for the state x [B, D] at a point."""
        self.evaluations += 1
        return target(self.prediction, p, *self._model.denoise(x, p.alpha, p.sigma))

    def errors(self, result: Tensor, to_zero: bool = False) -> list[float]:
        """For each mixture the median over its starts of the root-mean-square distance to the solution, or inf.

        The solution follows the probability-flow ODE to the schedule's least noise and takes the network's x0 there,
        because no model of this schedule was trained below it. With `to_zero` the ODE continues to σ = 0 instead.
        """
        squares = (result.double() - (self._clean if to_zero else self._predicted)).square() * self._used
        distance = (squares.sum(1) / self._used.sum(1)).sqrt()
        return distance.nan_to_num(math.inf).reshape(len(self.mixtures), -1).median(1).values.tolist()


class _SideBySide(Mixture):
    """Mixtures side by side: each for an equal part of the rows of a batch. Missing elements are 0."""

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        count, components = len(mixtures), max(len(m.means) for m in mixtures)
        self.used = torch.zeros(count, max(m.means.shape[1] for m in mixtures), dtype=torch.float64)
        self.means = torch.zeros(count, components, self.used.shape[1], dtype=torch.float64)
        self.deviations, self.weights = torch.ones(2, count, components, dtype=torch.float64)
        self.weights = self.weights * 0
        for i, m in enumerate(mixtures):
            k, d = m.means.shape
            self.used[i, :d], self.means[i, :k, :d] = 1, m.means
            self.deviations[i, :k], self.weights[i, :k] = m.deviations, m.weights
        self._lengths = self.means.square().sum(2)[:, None]  # squared [M, 1, K]
        self._elements = self.used.sum(1).reshape(-1, 1, 1)

    def denoise(self, x: Tensor, alpha: Any, sigma: Any) -> tuple[Tensor, Tensor]:
        """As `Mixture.denoise`, for numbers alpha and sigma; the distances by matrix products."""
        state = x.double().reshape(len(self.means), -1, self.means.shape[2])
        s2 = self.deviations.square()[:, None]
        variance = alpha * alpha * s2 + sigma * sigma  # [M, 1, K]
        away = state.square().sum(2, keepdim=True) - 2 * alpha * state @ self.means.mT + alpha * alpha * self._lengths
        log_density = -0.5 * (away / variance + self._elements * variance.log())
        share = torch.softmax(log_density + self.weights[:, None].log(), dim=2)
        pull, noise = share * (alpha * s2 / variance), share * (sigma / variance)
        x0 = (share - pull * alpha) @ self.means + state * pull.sum(2, keepdim=True)
        eps = state * noise.sum(2, keepdim=True) - alpha * noise @ self.means
        return x0.reshape(x.shape).to(x.dtype), eps.reshape(x.shape).to(x.dtype)


def _extrapolated(slope: Callable[[Tensor, float], Tensor], y: Tensor, start: float, width: float) -> Tensor:
    """One step of width `width`: modified midpoint with 2, 4, … 12 substeps, extrapolated in their squared length."""
    counts = range(2, 14, 2)
    table: list[Tensor] = []
    first = slope(y, start)
    for row, n in enumerate(counts):
        h = width / n
        before, now = y, y + h * first
        for i in range(1, n):
            before, now = now, before + 2 * h * slope(now, start + i * h)
        new = [(before + now + h * slope(now, start + width)) / 2]
        for column in range(row):
            ratio = (n / counts[row - 1 - column]) ** 2
            new.append(new[-1] + (new[-1] - table[column]) / (ratio - 1))
        table = new
    return table[-1]
