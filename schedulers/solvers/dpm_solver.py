"""DPM-Solver and DEIS: polynomials of ε (or x0) in λ."""

from __future__ import annotations

from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.solver import Steps, solver

from .algebra import adams_in_time, exponential, first, halved
from .multistep import along_lambda, multistep


@solver(
    order=3,
    grid="karras",
    aliases=("DEISMultistepScheduler",),
    reference="DEIS, Zhang and Chen 2022 (2204.13902), ρAB in ln ρ",
    formula="x' = (α'/α)·x + α'·∫ε dρ, ε a polynomial in λ through the latest `order` values",
    same='order 1: euler; 2: dpm_solver\'s "heun" form; 3: multistep DPM-Solver-3',
    when="Little error from 8 evaluations on, with order 4 from about 16 on.",
)
def deis(
    x: Any, grid: Grid, noise: Any, *, order: Literal[1, 2, 3, 4] = 3, variable: Literal["lambda", "t"] = "lambda"
) -> Steps:
    """Integrate a polynomial of ε in λ through the latest `order` values exactly.

    `variable` "t" takes polynomials in the time of the VP-SDE, as ComfyUI does: DEIS's tAB.
    """
    weights = along_lambda("eps") if variable == "lambda" else _in_time
    return (yield from multistep(x, grid, noise, "eps", order, weights))


def _in_time(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
    return tuple(q.alpha * c for c in adams_in_time(p.rho, q.rho, *(o.rho for o in past)))


@solver(
    order=2,
    grid="karras",
    aliases=("dpmsolver",),
    reference="DPM-Solver, Lu et al. 2022 (2206.00927), and DPM-Solver++ (2211.01095)",
    formula="x' = first + Σ c_j·(f_j − f), f = ε or x0 at earlier points (multistep) or at the stages (singlestep)",
    same="multistep: order 1 is euler; 2 of x0 dpmpp_2m; 3 of x0 dpmpp_3m; 3 of eps deis",
    when="To choose order, layout and quantity one by one, or to match diffusers' DPM-Solver classes.",
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
    """DPM-Solver (of ε) or DPM-Solver++ (of x0), with one evaluation at each point of the grid.

    Single-step: groups of `order` points. The first point begins the step, the others are its stages; the step to the
    clean picture is a group of its own.
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
            edit = edit + (d.x - x)  # keep what a pipeline changed in the state at this stage
        stages.append((p, getattr(d, of)))
        (s, now), (_, latest) = stages[0], stages[-1]
        edit, x = edit * (q.sigma / p.sigma), first(q, start)
        if len(stages) > 1:
            rule = halved if len(stages) == 2 else exponential
            (c,) = rule(k, q.lam - s.lam, p.lam - s.lam)
            x = x + (latest - now) * (c * (q.alpha if of == "x0" else q.sigma)) + edit
    return x
