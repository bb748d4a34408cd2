"""Exponential Runge–Kutta methods on x0, for the ODE and the reverse SDE: two or three evaluations a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.solver import Steps, solver

from .algebra import exponential, first, from_pure_noise, halved, noised


def exponential_stages(
    x: Any,
    grid: Grid,
    noise: Any,
    fractions: Sequence[float],
    eta: float,
    s_noise: float = 1.0,
    variant: str = "heun",
) -> Steps:
    """Steps with stages at these fractions of them in λ = ln(α/σ), for the reverse SDE with η.

    Each stage, and the end of the step, takes x0 as the straight line through the first value and the latest one:
    integrated exactly ("heun") or by its midpoint ("midpoint"). The noises of a step belong to one Brownian motion.
    """
    rule, k = halved if variant == "midpoint" else exponential, 1 + eta
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0:
            return d.x0
        if p.alpha == 0:  # λ has no beginning there; with η > 0 all of ε is replaced
            to = q if eta == 0 else Point(q.t, q.alpha, 0.0)
            x = yield from from_pure_noise(p, q, to, d)
            x = noised(x, (q.sigma**2 - to.sigma**2) ** 0.5 * s_noise, noise, p, q)
            continue
        stages = [q if r == 1 else grid.at(lam=p.lam + r * (q.lam - p.lam)) for r in fractions]
        before, last, drawn = p, d, 0.0
        for i, m in enumerate([*stages, q]):
            x = first(Point(m.t, m.alpha, m.sigma * (m.rho / p.rho) ** eta), d)
            if i > 0:
                x = x + (last.x0 - d.x0) * (rule(k, m.lam - p.lam, before.lam - p.lam)[0] * m.alpha)
            if eta * s_noise != 0:
                share = (m.rho / before.rho) ** eta  # what the step before → m leaves of the noise so far
                if m is not before:
                    drawn = drawn * share + noise(before, m) * (1 - share * share) ** 0.5
                x = x + drawn * (m.sigma * s_noise)
            if i < len(stages):
                last, before = (yield x, m), m
    return x


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    reference="SEEDS, Gonzalez et al. 2023 (2305.14267), algorithm SEEDS-2 of x0; ComfyUI, sample_seeds_2",
    formula="x' = (σ'/σ)·e^(−ηh)·x + α'(1 − e^(−(1+η)h))·(x0 + (x0_r − x0)/(2r)) + σ'·√(1 − e^(−2ηh))·z",
    same='eta=1 and r=0.5: dpmpp_sde; eta=0 and r=0.5: dpmpp_2s; r=1 and variant="heun": exp_heun_2_x0_sde',
    when="As dpmpp_sde. ComfyUI's workflows use this name.",
)
def seeds_2(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    variant: Literal["midpoint", "heun"] = "midpoint",
) -> Steps:
    """Take a step of two stages, the second at the fraction r of it in λ, for the reverse SDE with η.

    `variant` "midpoint" is the paper's φ₁; "heun" integrates the line through both values exactly (φ₂).
    """
    return (yield from exponential_stages(x, grid, noise, (r,), eta, s_noise, variant))


@solver(
    order=2,
    evaluations_per_step=3,
    stochastic=True,
    grid="karras",
    reference="SEEDS, Gonzalez et al. 2023 (2305.14267), algorithm SEEDS-3 of x0; ComfyUI, sample_seeds_3",
    formula="x' = (σ'/σ)·e^(−ηh)·x + σ'·∫e^((1+η)λ) x0 dλ + σ'·√(1 − e^(−2ηh))·z, x0 a line through λ and λ + 2h/3",
    same="eta=0: a single step of DPM-Solver++ of order 3",
    when="Stochastic sampling where evaluations are plenty: its error at 40 steps is a tenth of dpmpp_sde's.",
)
def seeds_3(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Take a step of three stages, at 0, 1/3 and 2/3 of it in λ, for the reverse SDE with η.

    Each stage integrates the line through the first value of x0 and the one before it exactly. Along the ODE (η = 0)
    the order is 3.
    """
    return (yield from exponential_stages(x, grid, noise, (1 / 3, 2 / 3), eta, s_noise))


@solver(
    order=2,
    evaluations_per_step=2,
    grid="karras",
    reference="Hochbruck and Ostermann 2010, exponential Heun, of x0 in λ; ComfyUI, sample_exp_heun_2_x0",
    formula="x' = (σ'/σ)·x + σ'·∫e^λ x0 dλ, x0 a straight line in λ from here to the end of the step",
    same='seeds_2(eta=0, r=1, variant="heun")',
    when="As heun, with less error where σ/α is large. ComfyUI's workflows use this name.",
)
def exp_heun_2_x0(x: Any, grid: Grid, noise: Any) -> Steps:
    """Take Heun's step for x0 in λ: integrate the line through x0 at both ends of the step exactly."""
    return (yield from exponential_stages(x, grid, noise, (1.0,), 0.0))


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    reference="ComfyUI, sample_exp_heun_2_x0_sde: SEEDS-2 (2305.14267) with the second stage at the end of the step",
    formula="exp_heun_2_x0 for the reverse SDE with η",
    same='seeds_2(r=1, variant="heun")',
    when="As seeds_2. ComfyUI's workflows use this name.",
)
def exp_heun_2_x0_sde(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Take the step of exp_heun_2_x0 for the reverse SDE with η."""
    return (yield from exponential_stages(x, grid, noise, (1.0,), eta, s_noise))
