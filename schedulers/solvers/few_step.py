"""For distilled models, which predict the clean picture in one evaluation: step to it, add noise, repeat."""

from __future__ import annotations

from typing import Any

from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.solver import Steps, solver

from .algebra import first, noised


@solver(
    order=1,
    stochastic=True,
    grid="trailing",
    aliases=("LCMScheduler", "FlowMatchLCMScheduler"),
    a1111="LCM",
    reference="Latent consistency models, Luo et al. 2023 (2310.04378), algorithm 3",
    formula="x' = α'·(c_skip·x + c_out·x0) + σ'·z",
    when="Latent consistency models and LCM adapters only, in 2 to 8 evaluations, with little guidance.",
)
def lcm(x: Any, grid: Grid, noise: Any, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> Steps:
    """Add fresh noise to the consistency function f = c_skip·x + c_out·x0.

    On tables of times c_skip = σ_d²/(s² + σ_d²) and c_out = s/√(s² + σ_d²), s = t·timestep_scaling, so that f differs
    from x0 only at the smallest t. On other schedules f = x0.
    """
    for p, q in grid.pairs():
        d = yield x, p
        f = d.x0
        if grid.noise.alphas_cumprod:
            norm = (p.t * timestep_scaling) ** 2 + sigma_data**2
            f = d.x * (sigma_data**2 / norm) + f * (p.t * timestep_scaling / norm**0.5)
        x = noised(f * q.alpha, q.sigma, noise, p, q)
    return x


@solver(
    order=1,
    stochastic=True,
    grid="trailing",
    aliases=("TCDScheduler",),
    a1111="TCD",
    reference="Trajectory consistency distillation, Zheng et al. 2024 (2402.19159): strategic stochastic sampling",
    formula="x' = α'·x0 + (α'ρ_s)·ε + α'·√(ρ'² − ρ_s²)·z at the time s = (1 − η)·t'",
    same="eta=0: euler",
    when="Trajectory consistency models and TCD adapters only, in 2 to 8 evaluations.",
)
def tcd(x: Any, grid: Grid, noise: Any, *, eta: float = 0.3) -> Steps:
    """Step to the time s = (1 − η)·t', below the next one, then add noise up to t'. `eta` is the paper's γ.

    On a table s is rounded down to a trained time. An edm schedule has no time 0, so there s is a level σ.
    """
    for p, q in grid.pairs():
        d = yield x, p
        s = q if q.sigma == 0 or eta == 0 else _earlier(grid, q, eta)
        to = Point(q.t, q.alpha, q.alpha * s.rho)
        x = noised(first(to, d), q.alpha * (q.rho**2 - s.rho**2) ** 0.5, noise, p, q)
    return x


def _earlier(grid: Grid, q: Point, eta: float) -> Point:
    if grid.noise.alphas_cumprod:
        return grid.at(t=float(int((1 - eta) * q.t)))
    if grid.noise.name == "edm":
        return Point(q.t, 1.0, (1 - eta) * q.sigma)
    return grid.at(t=(1 - eta) * q.t)


@solver(
    order=1,
    stochastic=True,
    grid="karras",
    aliases=("CMStochasticIterativeScheduler",),
    reference="Consistency models, Song et al. 2023 (2303.01469), algorithm 1",
    formula="x' = α'·(x0 + √(ρ'² − ρ_min²)·z)",
    when="Consistency models only, in one to four evaluations.",
)
def consistency(x: Any, grid: Grid, noise: Any) -> Steps:
    """Take the predicted picture as one at the schedule's least noise, and add noise up to the next level."""
    least = grid.noise.at(t=grid.noise.t_min).rho
    for p, q in grid.pairs():
        d = yield x, p
        x = noised(d.x0 * q.alpha, q.alpha * max(q.rho**2 - least**2, 0.0) ** 0.5, noise, p, q)
    return x
