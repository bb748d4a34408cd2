"""CFG++: x0 is that of the guided output, and ε that of the output without the prompt.

With the scale λ, x0 = x0_∅ + λ·(x0_c − x0_∅): the first-order step x' = α'·x0 + σ'·ε_∅ is the step without the prompt
plus α'·λ·(x0_c − x0_∅), whatever its length. So it is a step of plain guidance with the scale λ/(1 − ρ'/ρ): λ from 0 to
about 1 does what scales of 3 to 12 do elsewhere, and the same λ guides more in more steps. No equation has these runs
as solutions. The orders here are those with λ = ω·(1 − ρ'/ρ), against the equation of plain guidance with the scale ω;
without guidance, each is of the order of the solver without _cfg_pp in its name.
"""

from __future__ import annotations

import copy
from typing import Any

from schedulers.grid import Grid
from schedulers.prediction import Denoised, combine
from schedulers.solver import Steps, solver

from .algebra import halved
from .dpmpp import res_steps
from .euler import euler
from .gradient import gradient_estimation
from .midpoint import dpmpp_2s_ancestral

PAPER = "CFG++, Chung et al. 2024 (2406.08070)"
WHEN = "Guidance that keeps colours and layout, with --guidance from 0.2 to 1.5. More steps guide more."


def mixed(d: Denoised) -> Denoised:
    """The evaluation with the guided x0, and the ε of the output without the prompt."""
    both = copy.copy(d)
    both.eps = d.unconditional.eps
    return both


def plus(steps: Steps) -> Steps:
    """Run a solver on `mixed` evaluations."""
    x, p = next(steps)
    while True:
        d = yield x, p
        try:
            x, p = steps.send(mixed(d))
        except StopIteration as stop:
            return stop.value


@solver(
    order=1,
    cfg_pp=True,
    aliases=("DDIM CFG++", "CFG++ DDIM", "ddim_cfg_pp"),
    a1111="Euler CFG++",
    reference=f"{PAPER}, algorithm 2; ComfyUI, sample_euler_cfg_pp",
    formula="x' = α'·x0 + σ'·ε_∅, ε_∅ of the output without the prompt",
    same="scale λ: a step of euler with the guidance scale λ/(1 − ρ'/ρ)",
    when=WHEN,
)
def euler_cfg_pp(x: Any, grid: Grid, noise: Any) -> Steps:
    """Keep the guided picture, and scale the noise that the network sees without the prompt to the next level."""
    return (yield from plus(euler(x, grid, noise)))


@solver(
    order=1,
    cfg_pp=True,
    stochastic=True,
    aliases=("euler_a_cfg_pp",),
    a1111="Euler a CFG++",
    reference=f"{PAPER}; ComfyUI, sample_euler_ancestral_cfg_pp",
    formula="x' = α'·x0 + σ_down·ε_∅ + σ_up·z, with the σ_down and σ_up of euler_ancestral",
    when=WHEN,
)
def euler_ancestral_cfg_pp(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Take the step of euler_cfg_pp to below the next noise level, then add noise up to it."""
    return (yield from plus(euler(x, grid, noise, eta=eta, s_noise=s_noise)))


@solver(
    order=1,
    cfg_pp=True,
    grid="karras",
    reference=f"{PAPER}; ComfyUI, sample_gradient_estimation_cfg_pp",
    formula="x' = α'·x0 + σ'·ε_∅ + (γ − 1)·(ε_∅ − ε_∅₋)·(σ' − α'·σ/α), ₋ the step before",
    when=WHEN,
)
def gradient_estimation_cfg_pp(x: Any, grid: Grid, noise: Any, *, gamma: float = 2.0) -> Steps:
    """Take the step of gradient_estimation with the guided x0 and the ε without the prompt."""
    return (yield from plus(gradient_estimation(x, grid, noise, gamma=gamma)))


@solver(
    order=1,
    cfg_pp=True,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    a1111="DPM++ 2S a CFG++",
    reference="ComfyUI, sample_dpmpp_2s_ancestral_cfg_pp. The code of CFG++ differs: unguided up to the middle",
    formula="x_m = α_m·x0 + σ_m·ε_∅, x' = α'·x0 + σ_down·ε_∅ + (α' − σ_down/ρ)·(x0_m − x0) + σ_up·z",
    when=WHEN,
)
def dpmpp_2s_ancestral_cfg_pp(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Take the step of dpmpp_2s_ancestral with the guided x0 and the ε without the prompt."""
    return (yield from plus(dpmpp_2s_ancestral(x, grid, noise, eta=eta, s_noise=s_noise)))


@solver(
    order=1,
    cfg_pp=True,
    grid="karras",
    a1111="DPM++ 2M CFG++",
    reference=f"{PAPER}, its code; ComfyUI, sample_dpmpp_2m_cfg_pp",
    formula="x' = α'·x0 + σ'·ε_∅ + α'(1 − e^(−h))·h/(2h₋)·(x0 − x0_∅₋), ₋ the step before",
    when=WHEN,
)
def dpmpp_2m_cfg_pp(x: Any, grid: Grid, noise: Any) -> Steps:
    """Take the step of euler_cfg_pp, and extrapolate from the last x0 without the prompt to the guided one."""
    before: Any = None  # the point of the step before, and its x0 without the prompt
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0:
            return d.x0
        x = combine(q.alpha, d.x0, q.sigma, d.unconditional.eps)
        if before is not None:
            (c,) = halved(1.0, q.lam - p.lam, before[0].lam - p.lam)
            x = x + (before[1] - d.x0) * (q.alpha * c)
        before = (p, d.unconditional.x0) if p.alpha != 0 else None
    return x


@solver(
    order=1,
    cfg_pp=True,
    grid="karras",
    reference="ComfyUI, sample_res_multistep_cfg_pp: RES (2308.02157) with CFG++ (2406.08070)",
    formula="res_multistep without the prompt from the state x + α·(x0 − x0_∅); the first step is euler_cfg_pp's",
    same="res_multistep_ancestral_cfg_pp(eta=0)",
    when=WHEN,
)
def res_multistep_cfg_pp(x: Any, grid: Grid, noise: Any) -> Steps:
    """Move the state by the difference that the prompt makes, then take the step of res_multistep without it."""
    return (yield from res_steps(x, grid, noise, 0.0, 0.0))


@solver(
    order=1,
    cfg_pp=True,
    stochastic=True,
    grid="karras",
    reference="ComfyUI, sample_res_multistep_ancestral_cfg_pp",
    formula="res_multistep_cfg_pp to a point below the next noise level, then noise up to it",
    same="eta=0: res_multistep_cfg_pp",
    when=WHEN,
)
def res_multistep_ancestral_cfg_pp(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Take the step of res_multistep_cfg_pp to a lower noise level, then add noise up to the next one."""
    return (yield from res_steps(x, grid, noise, eta, s_noise))
