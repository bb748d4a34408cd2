"""First order: one evaluation a step, without history."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.prediction import Denoised
from schedulers.solver import Steps, solver

from .algebra import ancestral, first, halved, noised


@solver(
    order=1,
    grid="trailing",
    aliases=(
        "ddim",
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "CogVideoXDDIMScheduler",
        "EulerDiscreteScheduler",
        "EDMEulerScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "k_euler",
    ),
    a1111="Euler",
    reference="DDIM, Song et al. 2020 (2010.02502), eq. 12; the Euler method of EDM, Karras et al. 2022 (2206.00364)",
    formula="x' = α'·x0 + σ'·ε",
    same="DDIM; order 1 of DPM-Solver, DPM-Solver++, DEIS and UniPC; eta=1: euler_ancestral and ddpm",
    when="Distilled flow models, and models that give other solvers trouble. Never wrong, seldom the best.",
)
def euler(x: Any, grid: Grid, noise: Any, *, eta: float = 0.0, s_noise: float = 1.0) -> Steps:
    """Keep the predicted picture, and scale the predicted noise down to the next level.

    `eta` replaces a part of ε by fresh noise (DDIM eq. 16); 1 gives euler_ancestral.
    """
    for p, q in grid.pairs():
        d = yield x, p
        to, up = ancestral(p, q, eta)
        x = noised(first(to, d), up * s_noise, noise, p, q)
    return x


@solver(
    order=1,
    stochastic=True,
    grid="trailing",
    aliases=("euler_a", "k_euler_a", "k_euler_ancestral", "EulerAncestralDiscreteScheduler"),
    a1111="Euler a",
    reference="k-diffusion, sample_euler_ancestral; DDIM, Song et al. 2020 (2010.02502), eq. 16",
    formula="x' = α'·x0 + σ_down·ε + σ_up·z, σ_up = η·σ'·√(1 − (ρ'/ρ)²), σ_down² = σ'² − σ_up²",
    same="euler(eta=1), DDIM(η = 1), ddpm (fixed_small), SDE-DPM-Solver++ of first order",
    when="Varied pictures in 20 to 40 evaluations. The picture changes with the number of steps.",
)
def euler_ancestral(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Step below the next noise level with euler, then add noise up to it."""
    return (yield from euler(x, grid, noise, eta=eta, s_noise=s_noise))


@solver(
    order=1,
    stochastic=True,
    grid="trailing",
    aliases=("DDPMScheduler", "DDPMParallelScheduler"),
    a1111="DDPM",
    reference="DDPM, Ho et al. 2020 (2006.11239), eq. 7 and 11; learned: Improved DDPM (2102.09672), eq. 15",
    formula="x' = α'·x0 + √(σ'² − β̃)·ε + √β̃·z, β̃ = σ'²·(1 − (ρ'/ρ)²)",
    same="fixed_small: euler_ancestral, euler(eta=1), SDE-DPM-Solver++ of first order",
    when="The sampler of the DDPM paper, and learned variances, in hundreds of evaluations.",
)
def ddpm(
    x: Any, grid: Grid, noise: Any, *, variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_small"
) -> Steps:
    """Draw from the posterior q(x'|x, x0): the reverse process of DDPM, on any grid.

    `fixed_small` is the variance of the posterior, β̃; `fixed_large` is β = σ²(1 − (ρ'/ρ)²); `learned` reads v ∈ [−1, 1]
    from the second half of the output's channels: ln variance = f·ln β + (1 − f)·ln β̃ with f = (v + 1)/2.
    """
    for p, q in grid.pairs():
        d = yield x, p
        to, small = ancestral(p, q, 1.0)
        x = first(to, d)
        if q.sigma != 0:
            large = small * (p.sigma / q.sigma)
            if variance == "learned":
                f = (_learned(d) + 1) / 2
                x = x + large**f * small ** (1 - f) * noise(p, q)
            else:
                x = x + noise(p, q) * (large if variance == "fixed_large" else small)
    return x


def _learned(d: Denoised) -> Any:
    """The second half of the output's channels; 0 in a dry run."""
    if isinstance(d.output, float):
        return 0.0
    if d.output.shape[1] != 2 * d.x.shape[1]:
        raise ValueError(
            f"variance 'learned' needs an output of {2 * d.x.shape[1]} channels for a state of {d.x.shape[1]}; "
            f"this network gives {d.output.shape[1]}"
        )
    return d.output[:, d.x.shape[1] :]


@solver(
    order=1,
    grid="trailing",
    aliases=("ddim_inversion", "DDIMInverseScheduler"),
    upwards=True,
    reference="DDIM, Song et al. 2020 (2010.02502), section 4.3; Null-text inversion, Mokady et al. 2022 (2211.09794)",
    formula="x' = (α'/α)·x + (σ' − α'ρ)·ε(x, t')",
    when="Inversion: from a picture to the noise that euler turns into it, for edits that keep its layout.",
)
def ddim_inverse(x: Any, grid: Grid, noise: Any) -> Steps:
    """Walk the grid upwards, from a picture to the noise that euler turns into it.

    The run begins at the clean picture and ends at the grid's first point. ε is evaluated at the level at which the
    step ends, as in the step down from there. So this is the inverse of euler, except for the change of ε in between.
    """
    points = list(grid.points)[::-1]
    for p, q in pairwise(points):
        d = yield x, q
        x = d.x * (q.alpha / p.alpha) + d.eps * (q.sigma - q.alpha * p.rho)
    return x


@solver(
    order=2,
    grid="trailing",
    aliases=("DPMSolverMultistepInverseScheduler",),
    upwards=True,
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), with the times reversed; diffusers",
    formula="dpmpp_2m with p below q: x' = (σ'/σ)·x + α'(1 − e^(−h))·(x0 + h/(2h₋)·(x0 − x0₋)), h = λ' − λ < 0",
    when="Inversion in fewer evaluations than ddim_inverse.",
)
def dpmpp_2m_inverse(x: Any, grid: Grid, noise: Any) -> Steps:
    """Walk the grid upwards with the steps of dpmpp_2m, from a picture to noise.

    The picture counts as the state at the grid's least noise, so n points have n − 1 evaluations.
    """
    before: Any = None  # the point and x0 of the step before
    for p, q in pairwise(grid.points[-2::-1]):
        d = yield x, p
        x = first(q, d)
        if before is not None and q.alpha != 0:
            (c,) = halved(1.0, q.lam - p.lam, before[0].lam - p.lam)
            x = x + (before[1] - d.x0) * (q.alpha * c)
        before = (p, d.x0)
    return x
