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
)
def restart(
    x: Any, grid: Grid, noise: Any, *, times: int = 1, low: float = 0.1, high: float = 2.0, s_noise: float = 1.0
) -> Steps:
    """heun; where σ/α has come down to `low`, noise up to `high` and down again over the same points, `times` times.

    The ends are the grid's last point of at least `low` and its first of at most `high`; without two such points there
    is no restart.
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
