"""Heun's method: two evaluations a step, without history. The step to σ = 0 has one, so N steps have 2N − 1."""

from __future__ import annotations

import math
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.solver import Steps, solver

from .algebra import first, heun_correction, heun_step, noised


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


@solver(
    order=1,
    evaluations_per_step=3,
    grid="karras",
    a1111="HeunPP2",
    reference="ComfyUI, sample_heunpp2; sd-webui-samplers-scheduler, Heun++",
    formula="x' = first + α'(ρ' − ρ)·(w₂·(ε₂ − ε) + w₃·(ε₃ − ε)), w₂ = ρ'/(3ρ₀), w₃ = ρ''/(3ρ₀), ₀ the first point",
    when="Only to make pictures of other tools again: three evaluations a step for first order.",
)
def heunpp2(x: Any, grid: Grid, noise: Any) -> Steps:
    """Take an euler step with the mean of ε here, at the next point and at the one after, weighted by their levels.

    ε₃ is evaluated after a second euler step. The last step but one has w₂ = ρ'/(2ρ₀) and no w₃; the last is euler's.
    """
    level, points, last = grid.noise.level, grid.points, len(grid) - 1
    for i, (p, q) in enumerate(grid.pairs(), 1):
        d = yield x, p
        x = first(q, d)
        if i == last:
            return x
        e = yield x, q
        share = 2 / ((2 if i + 1 == last else 3) * level(points[0]))
        x = x + heun_correction(grid, p, q, d, e) * (share * level(q))
        if i + 1 < last:
            after = points[i + 1]
            f = yield first(after, e), after
            x = x + heun_correction(grid, p, q, d, f) * (share * level(after))
    return x
