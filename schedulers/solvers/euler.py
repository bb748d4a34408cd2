"""First order: one evaluation a step, nothing remembered."""

from __future__ import annotations

from typing import Any

from ..grids import Grid
from ..solver import Steps, solver


@solver(
    order=1,
    grid="trailing",
    aliases=("ddim", "DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "k_euler"),
    a1111="Euler",
    reference="DDIM, Song et al. 2020 (2010.02502), eq. 12 with η = 0; the Euler method of EDM, Karras et al. 2022",
)
def euler(x: Any, grid: Grid, noise: Any) -> Steps:
    """x' = α'·x0 + σ'·ε: keep what the network says of picture and noise, take less of the noise."""
    for p, q in grid.pairs():
        d = yield x, p
        x = q.alpha * d.x0 + q.sigma * d.eps
    return x
