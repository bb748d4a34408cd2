"""Midpoint methods: a second evaluation half-way in λ. The step to σ = 0 has one, so N steps have 2N − 1."""

from __future__ import annotations

from typing import Any

from schedulers.grid import Grid
from schedulers.solver import Steps, solver

from .algebra import ancestral, first, from_pure_noise, middle, midpoint, midpoint_step, noised


@solver(
    order=2,
    evaluations_per_step=2,
    grid="karras",
    aliases=("k_dpm_2", "KDPM2DiscreteScheduler"),
    a1111="DPM2",
    reference="DPM-Solver-2, Lu et al. 2022 (2206.00927), algorithm 1; k-diffusion, sample_dpm_2",
    formula="x' = (α'/α)·x + α'(ρ' − ρ)·ε(x_m, λ_m), λ_m = (λ + λ')/2, x_m the first-order step to λ_m",
    same="DPM-Solver-2, single-step, r = 1/2",
    when="To match older pictures. Multistep solvers have less error at the same number of evaluations.",
)
def dpm2(x: Any, grid: Grid, noise: Any) -> Steps:
    """Use the ε half-way in λ for the whole step."""
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
    formula="dpm2 to σ_down, then σ_up·z: σ_up = η·σ'·√(1 − (ρ'/ρ)²), σ_down² = σ'² − σ_up²",
    same="eta=0: dpm2",
    when="As euler_ancestral, at twice the evaluations.",
)
def dpm2_ancestral(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Step below the next noise level with dpm2, then add noise up to it."""
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
    formula="x' = (σ'/σ)·x + α'(1 − e^(−h))·x0(x_m, λ_m), λ_m = (λ + λ')/2",
    same="DPM-Solver++(2S)",
    when="Where no history can be kept. Otherwise dpmpp_2m has less error at the same number of evaluations.",
)
def dpmpp_2s(x: Any, grid: Grid, noise: Any) -> Steps:
    """Use the x0 half-way in λ for the whole step.

    diffusers' DPMSolverSinglestepScheduler takes points of the grid as the middles, with one evaluation a point; for
    that layout, see dpm_solver(method="singlestep", of="x0").
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
    formula="dpmpp_2s to σ_down, then σ_up·z, as dpm2_ancestral",
    same="eta=0: dpmpp_2s",
    when="To match pictures made with DPM++ 2S a.",
)
def dpmpp_2s_ancestral(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Step below the next noise level with dpmpp_2s, then add noise up to it."""
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
    formula="dpmpp_2s for the reverse SDE; both noises of a step are parts of one Brownian path",
    same="eta=0: dpmpp_2s",
    when="To match pictures made with DPM++ SDE. It needs few steps, each with two evaluations.",
)
def dpmpp_sde(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """dpmpp_2s for the reverse SDE: the noise of the half step is the first part of that of the whole step.

    Both are increments of one Brownian motion in 1/ρ² = (α/σ)², in which the noise of the reverse SDE grows evenly.
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
