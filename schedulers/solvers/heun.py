"""Heun's method: two evaluations a step, without history. The step to σ = 0 has one, so N steps have 2N − 1."""

from __future__ import annotations

import math
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.solver import Steps, solver

from .algebra import first, heun_step, noised


@solver(
    order=2,
    evaluations_per_step=2,
    grid="karras",
    aliases=("k_heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    a1111="Heun",
    reference="EDM, Karras et al. 2022 (2206.00364), algorithm 1",
    formula="x' = first + α'(ρ' − ρ)/2·(ε(first, t') − ε)",
    same="edm(s_churn=0)",
    when="Accurate second-order solutions without history. Below 10 evaluations it is the worst choice.",
)
def heun(x: Any, grid: Grid, noise: Any) -> Steps:
    """Take an euler step, then repeat it with the mean of ε at both ends. On a flow schedule, the same for dx/dσ."""
    for p, q in grid.pairs():
        x = yield from heun_step(x, p, q, grid)
    return x


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    reference="EDM, Karras et al. 2022 (2206.00364), algorithm 2",
    formula="ρ̂ = ρ·(1 + γ), x̂ = x + α̂·√(ρ̂² − ρ²)·z, then heun (or euler) from (x̂, ρ̂)",
    same="s_churn=0: heun, or euler",
    when="EDM's stochastic sampler, in hundreds of evaluations; churn corrects errors of the network.",
)
def edm(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    s_churn: float = 10.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.0,
    method: Literal["heun", "euler"] = "heun",
) -> Steps:
    """Raise the noise before each step with s_tmin ≤ ρ ≤ s_tmax, by the factor 1 + γ, γ = min(s_churn/N, √2 − 1).

    The noise is never raised above the schedule's largest. N is the number of steps of the whole grid. EDM table 5 has
    40, 0.05, 50, 1.003 for ImageNet-64 at 256 steps.
    """
    gamma = min(s_churn / grid.total, math.sqrt(2) - 1)
    for p, q in grid.pairs():
        hat = p
        if gamma > 0 and p.alpha != 0 and s_tmin <= p.rho <= s_tmax:
            hat = grid.at(lam=p.lam - math.log1p(gamma))
            added = max(hat.rho**2 - p.rho**2, 0.0) ** 0.5
            x = noised(x * (hat.alpha / p.alpha), hat.alpha * added * s_noise, noise, hat, p)
        if method == "heun":
            x = yield from heun_step(x, hat, q, grid)
        else:
            d = yield x, hat
            x = first(q, d)
    return x
