"""Linear multistep: one evaluation a step, the answers of earlier steps are used again.

They are one method. The first-order step assumes that x0 (or ε) stays as it is; here it is a polynomial through the
latest answers, integrated along λ = ln(α/σ) or along ρ = σ/α. A mid-way start begins with no history, at first order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.noise import Point, ops
from schedulers.solver import Steps, solver

from .algebra import adams, cached, differences, exponential, first, halved, heun_correction, moments, noised

Weights = Callable[[Point, Point, list[Point]], tuple[Any, ...]]  # of the step p → q, for the history, newest first


def multistep(
    x: Any,
    grid: Grid,
    noise: Any,
    of: str,
    order: int,
    weights: Weights,
    keep: Callable[[Point, Point], Any] = lambda p, q: 1.0,
    s_noise: float = 1.0,
    heun_first: bool = False,
) -> Steps:
    """x' = α'·x0 + σ'·(keep·ε + √(1 − keep²)·z) + Σ c_j·(f_j − f), f the x0 (or eps) of the latest `order` answers.

    The step to σ = 0 is x' = x0; an answer at α = 0, where λ has no end, is no node.
    """
    past: list[tuple[Point, Any]] = []
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0:
            return d.x0
        kept, now = keep(p, q), getattr(d, of)
        x = first(Point(q.t, q.alpha, q.sigma * kept), d)
        if past:
            points, answers = zip(*past, strict=True)
            x = x + differences(weights(p, q, list(points)), answers, now)
        if heun_first and p is grid[0] and len(grid) - 1 == grid.total:
            e = yield x, q
            x = x + heun_correction(grid, p, q, d, e)
        x = noised(x, q.sigma * (1 - kept * kept) ** 0.5 * s_noise, noise, p, q)
        if p.alpha != 0:
            past = [(p, now), *past][: order - 1]
    return x


def along_lambda(of: str, eta: float = 0.0, second_order: str = "heun") -> Weights:
    """Polynomials in λ, of x0 along the ODE or the SDE with η, or of ε; the second order exact or "midpoint"."""
    k = 1 + eta if of == "x0" else -1.0

    def weights(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
        rule = halved if second_order == "midpoint" and len(past) == 1 else exponential
        scale = q.alpha if of == "x0" else q.sigma
        return tuple(scale * c for c in rule(k, q.lam - p.lam, *(o.lam - p.lam for o in past)))

    return weights


def power(eta: float) -> Callable[[Point, Point], Any]:
    """What is left of ε after a step of the reverse SDE with η: (ρ'/ρ)^η, SDE-DPM-Solver++ eq. 18 for η = 1."""
    return lambda p, q: (q.rho / p.rho) ** eta


# x0 in λ


@solver(
    order=2,
    grid="karras",
    aliases=("k_dpmpp_2m", "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
    a1111="DPM++ 2M",
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), algorithm 2",
)
def dpmpp_2m(x: Any, grid: Grid, noise: Any, *, variant: Literal["midpoint", "heun"] = "midpoint") -> Steps:
    """The first-order step plus half the change of x0 since the last one, carried on along λ = ln(α/σ).

    `variant` "midpoint" is the paper's; "heun" integrates the change exactly and is res_multistep. The first predictor
    of unipc (bh2, order 2) is "midpoint" too.
    """
    return (yield from multistep(x, grid, noise, "x0", 2, along_lambda("x0", second_order=variant)))


@solver(
    order=3,
    grid="karras",
    aliases=("k_dpmpp_3m",),
    a1111="DPM++ 3M",
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), appendix B, with the second difference in full",
)
def dpmpp_3m(x: Any, grid: Grid, noise: Any) -> Steps:
    """x0 as a parabola in λ through the latest three answers, integrated exactly: third order.

    diffusers, k-diffusion and others take half of the second difference, and have second order.
    """
    return (yield from multistep(x, grid, noise, "x0", 3, along_lambda("x0")))


@solver(
    order=2,
    grid="karras",
    reference="RES, Zhang et al. 2023 (2308.02157), multistep of second order; ComfyUI, sample_res_multistep",
)
def res_multistep(x: Any, grid: Grid, noise: Any) -> Steps:
    """x0 as a straight line in λ through the latest two answers, integrated exactly: dpmpp_2m(variant="heun")."""
    return (yield from multistep(x, grid, noise, "x0", 2, along_lambda("x0")))


@solver(
    order=2,
    stochastic=True,
    grid="karras",
    aliases=("dpmpp_2m_sde_gpu", "k_dpmpp_2m_sde", "CosineDPMSolverMultistepScheduler"),
    a1111="DPM++ 2M SDE",
    reference="DPM-Solver++, Lu et al. 2022 (2211.01095), SDE-DPM-Solver++(2M); k-diffusion, sample_dpmpp_2m_sde",
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
    """dpmpp_2m for the reverse SDE: a part of ε is replaced by fresh noise. η = 0 is dpmpp_2m."""
    return (yield from multistep(x, grid, noise, "x0", 2, along_lambda("x0", eta, variant), power(eta), s_noise))


@solver(
    order=2,
    stochastic=True,
    grid="exponential",
    aliases=("dpmpp_3m_sde_gpu", "k_dpmpp_3m_sde"),
    a1111="DPM++ 3M SDE",
    reference="k-diffusion, sample_dpmpp_3m_sde, with the second difference in full",
)
def dpmpp_3m_sde(x: Any, grid: Grid, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """dpmpp_3m for the reverse SDE: a part of ε is replaced by fresh noise. η = 0 is dpmpp_3m."""
    return (yield from multistep(x, grid, noise, "x0", 3, along_lambda("x0", eta), power(eta), s_noise))


@solver(
    order=2,
    stochastic=True,
    grid="karras",
    reference="ER-SDE-Solver, Cui et al. 2023 (2309.06169), algorithms 1 to 3 with φ(ρ) = ρ·(exp(ρ^0.3) + 10)",
)
def er_sde(x: Any, grid: Grid, noise: Any, *, order: Literal[1, 2, 3] = 3, s_noise: float = 1.0) -> Steps:
    """Multistep on x0 for an extended reverse SDE, which adds much noise while there is much and little at the end.

    Of ε is kept g(ρ')/g(ρ), g(ρ) = exp(ρ^0.3) + 10, ρ = σ/α; x0 is a polynomial in ρ, integrated exactly.
    """

    def g(rho: Any) -> Any:
        return ops(rho).exp(rho**0.3) + 10

    def weights(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
        return tuple(q.alpha * c for c in _extended(p.lam, q.lam, *(o.lam for o in past)))

    return (yield from multistep(x, grid, noise, "x0", order, weights, lambda p, q: g(q.rho) / g(p.rho), s_noise))


@cached
def _extended(lam: Any, to: Any, *lams: Any) -> tuple[Any, ...]:
    """∫ φ(ρ')·L_j(ρ) d(1/φ) over λ … to, φ(ρ) = ρ·(e^(ρ^0.3) + 10), for the nodes ρ, *rhos, without the first."""

    def rho(u: Any) -> Any:
        return ops(u).exp(-u)

    def weight(u: Any) -> Any:
        grown, end = ops(u).exp(rho(u) ** 0.3), ops(to).exp(rho(to) ** 0.3)
        growth = 1 + 0.3 * rho(u) ** 0.3 * grown / (grown + 10)
        return growth * (rho(to) * (end + 10)) / (rho(u) * (grown + 10))

    return moments(weight, lambda u: rho(u) - rho(lam), lam, to, [rho(u) - rho(lam) for u in lams])


# ε in λ


@solver(
    order=3,
    grid="karras",
    aliases=("DEISMultistepScheduler",),
    reference="DEIS, Zhang and Chen 2022 (2204.13902), ρAB in ln ρ",
)
def deis(x: Any, grid: Grid, noise: Any, *, order: Literal[1, 2, 3, 4] = 3) -> Steps:
    """ε as a polynomial in λ = ln(α/σ) through the latest answers, integrated exactly.

    Order 1 is euler; order 3 is the multistep DPM-Solver-3, order 2 its "heun" form.
    """
    return (yield from multistep(x, grid, noise, "eps", order, along_lambda("eps")))


@solver(
    order=2,
    grid="karras",
    aliases=("dpmsolver",),
    reference="DPM-Solver, Lu et al. 2022 (2206.00927), and DPM-Solver++ (2211.01095)",
)
def dpm_solver(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    order: Literal[1, 2, 3] = 2,
    method: Literal["multistep", "singlestep"] = "multistep",
    of: Literal["eps", "x0"] = "eps",
) -> Steps:
    """DPM-Solver (of ε) or DPM-Solver++ (of x0) with one evaluation at each point of the grid.

    Multistep: order 1 is euler, 2 of x0 is dpmpp_2m, 3 of x0 is dpmpp_3m, 3 of ε is deis. Single-step: groups of
    `order` points, of which the first begins the step and the others are its stages; the step to the clean picture
    stands alone.
    """
    if method == "multistep":
        weights = along_lambda(of, second_order="midpoint" if order == 2 else "heun")
        return (yield from multistep(x, grid, noise, of, order, weights))
    k, edit = 1.0 if of == "x0" else -1.0, 0.0
    stages: list[tuple[Point, Any]] = []
    start: Any = None
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0:
            return d.x0
        if not stages or len(stages) == order or stages[0][0].alpha == 0:
            start, stages, edit = d, [], 0.0
        else:
            edit = edit + (d.x - x)  # what a pipeline changed at this stage goes along
        stages.append((p, getattr(d, of)))
        (s, now), (_, latest) = stages[0], stages[-1]
        edit, x = edit * (q.sigma / p.sigma), first(q, start)
        if len(stages) > 1:
            rule = halved if len(stages) == 2 else exponential
            (c,) = rule(k, q.lam - s.lam, p.lam - s.lam)
            x = x + (latest - now) * (c * (q.alpha if of == "x0" else q.sigma)) + edit
    return x


# ε in ρ


@solver(
    order=4,
    grid="karras",
    aliases=("k_lms", "LMSDiscreteScheduler"),
    a1111="LMS",
    reference="k-diffusion, sample_lms: Adams–Bashforth for variable steps, in σ/α",
)
def lms(x: Any, grid: Grid, noise: Any, *, order: Literal[1, 2, 3, 4] = 4) -> Steps:
    """ε as a polynomial in ρ = σ/α through the latest answers, integrated exactly. The same as ipndm_v."""

    def weights(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
        return tuple(q.alpha * c for c in adams(p.rho, q.rho, *(o.rho for o in past)))

    return (yield from multistep(x, grid, noise, "eps", order, weights))


@solver(
    order=4,
    grid="karras",
    reference="diff-sampler, ipndm_v: PNDM, Liu et al. 2022 (2202.09778), for variable steps",
)
def ipndm_v(x: Any, grid: Grid, noise: Any, *, order: Literal[1, 2, 3, 4] = 4) -> Steps:
    """ipndm with the weights of the steps that are taken. The same as lms."""
    return (yield from lms(x, grid, noise, order=order))


ADAMS_BASHFORTH = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))  # of even steps, without the latest


def _even(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
    return tuple((q.sigma - q.alpha * p.rho) * c for c in ADAMS_BASHFORTH[len(past)])


@solver(
    order=2,
    grid="karras",
    aliases=("IPNDMScheduler",),
    reference="PNDM, Liu et al. 2022 (2202.09778), and DEIS (2204.13902), appendix: improved PNDM",
)
def ipndm(x: Any, grid: Grid, noise: Any, *, order: Literal[1, 2, 3, 4] = 4) -> Steps:
    """Adams–Bashforth on ε with the weights of even steps, whatever the grid's: strong where evaluations are few."""
    return (yield from multistep(x, grid, noise, "eps", order, _even))


@solver(
    order=2,
    grid="trailing",
    aliases=("plms", "PNDMScheduler"),
    a1111="PLMS",
    reference="PNDM, Liu et al. 2022 (2202.09778), algorithm 2 without Runge–Kutta steps, as Stable Diffusion 1 has it",
)
def pndm(x: Any, grid: Grid, noise: Any) -> Steps:
    """ipndm of order 4 whose first step is Heun's: one evaluation more."""
    return (yield from multistep(x, grid, noise, "eps", 4, _even, heun_first=True))
