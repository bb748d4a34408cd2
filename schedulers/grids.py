"""At which times do we ask the network?

A grid holds points of falling noise; the last is the clean picture (σ = 0), where nothing is asked. Times are floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .noise import CLEAN, NoiseSchedule, Point, ops


class Grid:
    """N + 1 points from the noisiest down to σ = 0. `grid[i]` is a point, `grid[i:]` the rest of the grid."""

    def __init__(self, points: list[Point], noise: NoiseSchedule) -> None:
        self.points, self.noise = points, noise

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: Any) -> Any:
        return Grid(self.points[i], self.noise) if isinstance(i, slice) else self.points[i]

    def pairs(self) -> Iterator[tuple[Point, Point]]:
        """(from, to) of each step."""
        yield from zip(self.points[:-1], self.points[1:], strict=True)

    def at(self, *, t: Any = None, lam: Any = None) -> Point:
        """A point off the grid: a solver's midpoint."""
        return self.noise.at(t=t, lam=lam)


GRIDS: dict[str, Callable[..., list[Point]]] = {}


def grid(function: Callable[..., list[Point]]) -> Callable[..., list[Point]]:
    """Register a grid: a function of (noise, n) that returns the n points at which to ask."""
    GRIDS[function.__name__] = function
    return function


def build(name: str, noise: NoiseSchedule, n: int) -> Grid:
    """The grid `name` of n steps. Raises ValueError for n < 1 or points that do not fall strictly."""
    if n < 1:
        raise ValueError(f"steps must be at least 1, got {n}")
    points = GRIDS[name](noise, n)
    if any(p.sigma * q.alpha <= q.sigma * p.alpha for p, q in zip(points, points[1:], strict=False)):
        raise ValueError(f"{n} steps are too many for {noise!r} on the grid {name!r}: the noise does not fall in each")
    return Grid([*points, CLEAN], noise)


def uniform(noise: NoiseSchedule, u: float) -> Point:
    """The point at the fraction u ∈ (0, 1] of the time axis: t = u·T − 1 of a table, the shifted σ of a flow."""
    if noise.name == "flow":
        return noise.at(t=noise.T * noise.shift * u / (1 + (noise.shift - 1) * u))
    if noise.alphas_cumprod:
        return noise.at(t=max(u * noise.T - 1, 0.0))
    return noise.at(t=noise.t_min + (noise.t_max - noise.t_min) * u)


@grid
def trailing(noise: NoiseSchedule, n: int) -> list[Point]:
    """t = T·(1 − k/n) − 1, k = 0 … n−1: starts at the most noise (Lin et al. 2023, table 2)."""
    return [uniform(noise, 1 - k / n) for k in range(n)]


@grid
def karras(noise: NoiseSchedule, n: int, rho: float = 7.0) -> list[Point]:
    """σ/α with its ρ-th root uniform from largest to smallest (EDM eq. 5); σ itself on a flow schedule."""
    return ramp(noise, n, lambda u, big, small: (big ** (1 / rho) + u * (small ** (1 / rho) - big ** (1 / rho))) ** rho)


def ramp(noise: NoiseSchedule, n: int, level: Callable[[float, float, float], float]) -> list[Point]:
    """n points whose level falls from the schedule's largest to its smallest: level(u, largest, smallest), u = 0 … 1.

    The level is σ/α; on a flow schedule it is σ. Where a table ends in pure noise, the first point is that end and the
    ramp begins one entry below it.
    """
    us = [k / (n - 1) if n > 1 else 0.0 for k in range(n)]
    if noise.name == "flow":
        big, small = noise.sigma(noise.t_max), noise.sigma(noise.t_min)
        return [noise.at(t=noise.T * level(u, big, small)) for u in us]
    top, bottom = noise.noisiest, noise.at(t=noise.t_min)
    if top.alpha == 0:
        below = noise.at(t=noise.t_max - 1)
        us = [k / (n - 2) if n > 2 else 0.0 for k in range(n - 1)]
        return [top, *(_between(noise, level(u, below.rho, bottom.rho), below, bottom) for u in us)]
    return [_between(noise, level(u, top.rho, bottom.rho), top, bottom) for u in us]


def _between(noise: NoiseSchedule, rho: float, top: Point, bottom: Point) -> Point:
    """The point at σ/α = ρ; the ends are themselves, so that rounding cannot leave the schedule."""
    if rho >= top.rho * (1 - 1e-12):
        return top
    if rho <= bottom.rho * (1 + 1e-12):
        return bottom
    return noise.at(lam=-ops(rho).log(rho))
