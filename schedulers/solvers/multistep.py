"""Linear multistep: one evaluation a step, the answers of earlier steps are used again."""

from __future__ import annotations

from typing import Any

from ..grids import Grid
from ..solver import Steps, solver


@solver(
    order=2,
    grid="karras",
    aliases=("DPMSolverMultistepScheduler", "dpm++2m", "dpmpp2m", "k_dpmpp_2m"),
    a1111="DPM++ 2M",
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), algorithm 2",
)
def dpmpp_2m(x: Any, grid: Grid, noise: Any) -> Steps:
    """The first-order step plus half the change of x0 since the last one, carried on along λ = ln(α/σ)."""
    before = before_x0 = None
    for p, q in grid.pairs():
        d = yield x, p
        x = q.alpha * d.x0 + q.sigma * d.eps
        if before is not None and before.alpha != 0 and q.sigma != 0:
            r = (p.lam - before.lam) / (q.lam - p.lam)
            x = x + (d.x0 - before_x0) * ((q.alpha - q.sigma * p.alpha / p.sigma) / (2 * r))
        before, before_x0 = p, d.x0
    return x
