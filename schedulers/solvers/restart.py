"""Restart sampling."""

from __future__ import annotations

from typing import Any

from schedulers.grid import Grid
from schedulers.solver import Steps, solver

from .algebra import heun_step, noised


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    a1111="Restart",
    reference="Restart sampling, Xu et al. 2023 (2306.14878), algorithm 1",
    formula="heun; at ρ_low: x + α·√(ρ_high² − ρ_low²)·z, and down again",
    when="Many evaluations, where the network's errors matter more than those of the solver.",
)
def restart(
    x: Any, grid: Grid, noise: Any, *, times: int = 1, low: float = 0.1, high: float = 2.0, s_noise: float = 1.0
) -> Steps:
    """heun; when ρ = σ/α reaches `low`, add noise up to `high` and step down again over the same points, `times` times.

    The interval runs from the grid's first point of at most `high` to its last of at least `low`; without two such
    points there is no restart.
    """
    inside = [i for i, p in enumerate(grid.points) if low <= p.rho <= high]
    again = grid[inside[0] : inside[-1] + 1] if len(inside) > 1 else None
    for p, q in grid.pairs():
        x = yield from heun_step(x, p, q, grid)
        if again is not None and q is again[-1]:
            top = again[0]
            for _ in range(times):
                added = top.alpha * (top.rho**2 - q.rho**2) ** 0.5
                x = noised(x * (top.alpha / q.alpha), added * s_noise, noise, top, q)
                for a, b in again.pairs():
                    x = yield from heun_step(x, a, b, grid)
    return x
