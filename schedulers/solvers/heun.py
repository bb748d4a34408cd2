"""Two evaluations a step, none remembered. The step to the clean picture has one, so N steps ask 2N − 1 times."""

from __future__ import annotations

import math
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.solver import Steps, solver

from .algebra import ancestral, first, from_pure_noise, heun_step, middle, midpoint, midpoint_step, noised


@solver(
    order=2,
    evaluations_per_step=2,
    grid="karras",
    aliases=("k_heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    a1111="Heun",
    reference="EDM, Karras et al. 2022 (2206.00364), algorithm 1",
)
def heun(x: Any, grid: Grid, noise: Any) -> Steps:
    """An euler step, then again with the mean of ε here and ε there.

    x' = first + α'(ρ' − ρ)/2·(ε₂ − ε₁), ρ = σ/α; on a flow schedule the same for dx/dσ.
    """
    for p, q in grid.pairs():
        x = yield from heun_step(x, p, q, grid)
    return x


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    reference="EDM, Karras et al. 2022 (2206.00364), algorithm 2",
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
    """Where s_tmin ≤ σ/α ≤ s_tmax, raise the noise by 1 + min(s_churn/N, √2 − 1), ask there, and step down from there.

    With s_churn = 0 this is heun (or euler). Where the schedule ends, so does the raise. N is the number of steps of
    this run. EDM's own choice for ImageNet-64 is 40, 0.05, 50, 1.003 at 256 steps (table 5).
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
    order=2,
    evaluations_per_step=2,
    grid="karras",
    aliases=("k_dpm_2", "KDPM2DiscreteScheduler"),
    a1111="DPM2",
    reference="DPM-Solver-2, Lu et al. 2022 (2206.00927), algorithm 1; k-diffusion, sample_dpm_2",
)
def dpm2(x: Any, grid: Grid, noise: Any) -> Steps:
    """The ε half-way in λ = ln(α/σ) counts for the whole step: x' = (α'/α)·x + α'(ρ' − ρ)·ε_m, ρ = σ/α.

    The same as DPM-Solver-2, single-step, with r = 1/2.
    """
    for p, q in grid.pairs():
        x = yield from midpoint_step(x, p, q, grid, noise, "eps")
    return x


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    aliases=("dpm2_a", "k_dpm_2_a", "k_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    a1111="DPM2 a",
    reference="k-diffusion, sample_dpm_2_ancestral",
)
def dpm2_ancestral(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """dpm2 to a point below the next noise level, then noise up to it; η = 0 is dpm2."""
    for p, q in grid.pairs():
        x = yield from midpoint_step(x, p, q, grid, noise, "eps", eta, s_noise)
    return x


@solver(
    order=2,
    evaluations_per_step=2,
    grid="karras",
    aliases=("DPMSolverSinglestepScheduler",),
    a1111="DPM++ 2S",
    reference="DPM-Solver++(2S), Lu et al. 2022 (2211.01095), algorithm 1",
)
def dpmpp_2s(x: Any, grid: Grid, noise: Any) -> Steps:
    """The x0 half-way in λ = ln(α/σ) counts for the whole step: x' = (σ'/σ)·x + (α' − α·σ'/σ)·x0_m.

    diffusers' DPMSolverSinglestepScheduler is the same with grid points as the middles; for that layout, one evaluation
    a point, see dpm_solver(method="singlestep", of="x0").
    """
    for p, q in grid.pairs():
        x = yield from midpoint_step(x, p, q, grid, noise, "x0")
    return x


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    aliases=("dpmpp_2s_a", "k_dpmpp_2s_a", "k_dpmpp_2s_ancestral"),
    a1111="DPM++ 2S a",
    reference="k-diffusion, sample_dpmpp_2s_ancestral",
)
def dpmpp_2s_ancestral(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """dpmpp_2s to a point below the next noise level, then noise up to it; η = 0 is dpmpp_2s."""
    for p, q in grid.pairs():
        x = yield from midpoint_step(x, p, q, grid, noise, "x0", eta, s_noise)
    return x


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    aliases=("dpmpp_sde_gpu", "k_dpmpp_sde", "DPMSolverSDEScheduler"),
    a1111="DPM++ SDE",
    reference="k-diffusion, sample_dpmpp_sde: DPM-Solver++ (2211.01095) for the reverse SDE, two stages",
)
def dpmpp_sde(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """dpmpp_2s for the reverse SDE: the noise of the half step is the first part of that of the whole step.

    Both are increments of one Brownian motion, in 1/ρ² = (α/σ)², in which the noise of the reverse SDE grows evenly.
    """
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0:
            return d.x0
        to, up = ancestral(p, q, eta)
        if p.alpha == 0 or to.sigma == 0:
            x = yield from from_pure_noise(p, q, to, d)
            x = noised(x, up * s_noise, noise, p, q)
            continue
        m = middle(grid, p, q)
        half, half_up = ancestral(p, m, eta)
        z = noise(p, m) if eta * s_noise != 0 else 0.0
        e = yield first(half, d) + z * (half_up * s_noise), m
        x = first(to, d) + midpoint(p, to, d, e, "x0")
        if eta * s_noise != 0:
            share = ((m.rho**-2 - p.rho**-2) / (q.rho**-2 - p.rho**-2)) ** 0.5
            x = x + (z * share + noise(m, q) * (1 - share * share) ** 0.5) * (up * s_noise)
    return x
