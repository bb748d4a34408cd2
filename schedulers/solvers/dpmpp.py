"""DPM-Solver++, multistep: polynomials of x0 in λ, along the ODE and along the reverse SDE."""

from __future__ import annotations

from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.noise import ops
from schedulers.solver import Steps, solver

from .algebra import ancestral, exponential, first, noised
from .multistep import along_lambda, multistep, power


@solver(
    order=2,
    grid="karras",
    aliases=("k_dpmpp_2m", "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
    a1111="DPM++ 2M",
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), algorithm 2",
    formula="x' = (σ'/σ)·x + α'(1 − e^(−h))·(x0 + h/(2h₋)·(x0 − x0₋)), ₋ the step before",
    same='dpm_solver(order=2, of="x0"); variant="heun": res_multistep; dpmpp_2m_sde(eta=0)',
    when="The common choice for guided sampling, in 15 to 30 evaluations.",
)
def dpmpp_2m(x: Any, grid: Grid, noise: Any, *, variant: Literal["midpoint", "heun"] = "midpoint") -> Steps:
    """Extrapolate x0 along λ from its change since the last step.

    `variant` "midpoint" is the paper's; "heun" integrates the change exactly.
    """
    return (yield from multistep(x, grid, noise, "x0", 2, along_lambda("x0", second_order=variant)))


@solver(
    order=1,
    grid="karras",
    aliases=("dpm++2mv2",),
    a1111="DPM++ 2M v2",
    reference="AUTOMATIC1111, discussion 8457; stable-diffusion.cpp, dpm++2mv2",
    formula="x' = (σ'/σ)·x + α'(1 − e^(−(h + h₋)/2))·(x0 + r/2·(x0 − x0₋)), r = min(h, h₋)/max(h, h₋)",
    when="Only to make pictures of other tools again: where steps differ in length it is of first order.",
)
def dpmpp_2m_v2(x: Any, grid: Grid, noise: Any) -> Steps:
    """Take the step of dpmpp_2m with the mean of the last two lengths in λ, and less extrapolation."""
    before: Any = None  # the point and x0 of the step before
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0:
            return d.x0
        x = first(q, d)
        if before is not None:
            h, last = q.lam - p.lam, p.lam - before[0].lam
            part = 1 - ops(h).exp(-(h + last) / 2)
            r = min(h, last) / max(h, last)
            x = x + (d.x0 * (part - 1 + q.rho / p.rho) + (d.x0 - before[1]) * (part * r / 2)) * q.alpha
        before = (p, d.x0) if p.alpha != 0 else None
    return x


@solver(
    order=3,
    grid="karras",
    aliases=("k_dpmpp_3m",),
    a1111="DPM++ 3M",
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), appendix B, with the second difference in full",
    formula="x' = (σ'/σ)·x + σ'·∫e^λ x0 dλ, x0 a parabola in λ through the latest three values",
    same='dpm_solver(order=3, of="x0"); dpmpp_3m_sde(eta=0)',
    when="Accurate solutions in 40 evaluations or more. With fewer, variant='half' has less error, and deis the least.",
)
def dpmpp_3m(x: Any, grid: Grid, noise: Any, *, variant: Literal["full", "half"] = "full") -> Steps:
    """Integrate a parabola of x0 in λ through the latest three values exactly: third order.

    `variant` "half" takes half of the second difference, as diffusers, k-diffusion and others: of second order, but
    with a smaller error below 30 evaluations, where long steps extrapolate too far.
    """
    return (yield from multistep(x, grid, noise, "x0", 3, along_lambda("x0", third_order=variant)))


@solver(
    order=2,
    grid="karras",
    reference="RES, Zhang et al. 2023 (2308.02157), multistep of second order; ComfyUI, sample_res_multistep",
    formula="x' = (σ'/σ)·x + σ'·∫e^λ x0 dλ, x0 a straight line in λ through the latest two values",
    same='dpmpp_2m(variant="heun")',
    when="As dpmpp_2m. ComfyUI's workflows use this name.",
)
def res_multistep(x: Any, grid: Grid, noise: Any) -> Steps:
    """Integrate a straight line of x0 in λ through the latest two values exactly."""
    return (yield from multistep(x, grid, noise, "x0", 2, along_lambda("x0")))


@solver(
    order=2,
    stochastic=True,
    grid="karras",
    reference="ComfyUI, sample_res_multistep_ancestral: RES (2308.02157) with ancestral steps",
    formula="res_multistep to a point below the next noise level, then noise up to it",
    same="eta=0: res_multistep",
    when="As dpmpp_2m_sde. ComfyUI's workflows use this name.",
)
def res_multistep_ancestral(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Take the step of res_multistep to a lower noise level, then add noise up to the next one.

    The straight line in λ runs from the point that the step before reached without its noise.
    """
    return (yield from res_steps(x, grid, noise, eta, s_noise))


def res_steps(x: Any, grid: Grid, noise: Any, eta: float, s_noise: float) -> Steps:
    """The steps of res_multistep_ancestral; for CFG++ without the prompt, the difference that it makes added first."""
    x0: Any = None
    length = 0.0  # of the step before, in λ, without its noise
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0:
            return d.x0
        to, up = ancestral(p, q, eta)
        e = d.unconditional
        x = first(to, e)
        if e is not d:
            x = x + (d.x0 - e.x0) * (to.alpha if x0 is None else to.sigma / p.rho)
        if x0 is not None and to.sigma != 0:
            x = x + (x0 - e.x0) * (to.alpha * exponential(1.0, to.lam - p.lam, -length)[0])
        x = noised(x, up * s_noise, noise, p, q)
        x0, length = (e.x0, to.lam - p.lam) if p.alpha != 0 and to.sigma != 0 else (None, 0.0)
    return x


@solver(
    order=2,
    stochastic=True,
    grid="karras",
    aliases=(
        "dpmpp_2m_sde_gpu",
        "dpm++2m_sde_bt",
        "k_dpmpp_2m_sde",
        "CosineDPMSolverMultistepScheduler",
        "CogVideoXDPMScheduler",
    ),
    a1111="DPM++ 2M SDE",
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), SDE-DPM-Solver++(2M); k-diffusion, sample_dpmpp_2m_sde",
    formula="dpmpp_2m with e^(−(1+η)h) for e^(−h), then σ'·√(1 − e^(−2ηh))·z",
    same="eta=0: dpmpp_2m",
    when="Pictures with fresh detail, in 20 to 50 evaluations.",
)
def dpmpp_2m_sde(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    variant: Literal["midpoint", "heun"] = "midpoint",
) -> Steps:
    """dpmpp_2m for the reverse SDE: each step replaces a part of ε by fresh noise."""
    return (yield from multistep(x, grid, noise, "x0", 2, along_lambda("x0", eta, variant), power(eta), s_noise))


@solver(
    order=2,
    stochastic=True,
    grid="exponential",
    aliases=("dpmpp_3m_sde_gpu", "k_dpmpp_3m_sde"),
    a1111="DPM++ 3M SDE",
    reference="k-diffusion, sample_dpmpp_3m_sde, with the second difference in full",
    formula="dpmpp_3m with the kernel e^((1+η)λ), then σ'·√(1 − e^(−2ηh))·z",
    same="eta=0: dpmpp_3m",
    when="As dpmpp_2m_sde, in 30 evaluations or more.",
)
def dpmpp_3m_sde(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    variant: Literal["full", "half"] = "full",
) -> Steps:
    """dpmpp_3m for the reverse SDE: each step replaces a part of ε by fresh noise.

    `variant` "half" takes half of the second difference, as k-diffusion does.
    """
    weights = along_lambda("x0", eta, third_order=variant)
    return (yield from multistep(x, grid, noise, "x0", 3, weights, power(eta), s_noise))
