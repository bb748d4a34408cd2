"""Predictor–corrector multistep: each new output also corrects the step before it, without a further evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.solver import Steps, solver

from .algebra import differences, exponential, first, halved, linear, noised, trapezoid


def predictor_corrector(
    x: Any,
    grid: Grid,
    noise: Any,
    orders: Callable[[int], tuple[int, int]],
    second_order: Callable[..., tuple[Any, ...]],
    tau: Callable[[Point, Point], float] = lambda p, q: 0.0,
    evaluate_again: bool = False,
) -> Steps:
    """Polynomials of x0 in λ through the latest values: predict each step, and correct it by the value at its end.

    `orders(n)`, n steps before the end, are the number of values of the prediction, and of the correction of the step
    before, the new value included. `second_order` is the rule for one further value. τ² is the η of the reverse SDE.
    With `evaluate_again` the corrected state is evaluated too, and takes the place of the predicted one.
    """
    last: Any = None  # the step before: (point, Denoised, exponent k in λ, what it added to the first-order step)
    past: list[tuple[Point, Any]] = []

    def added(k: float, p: Point, now: Any, q: Point, others: list[tuple[Point, Any]]) -> Any:
        rule = second_order if len(others) == 1 else exponential
        weights = rule(k, q.lam - p.lam, *(o.lam - p.lam for o, _ in others)) if others else ()
        return differences(weights, (f for _, f in others), now) * q.alpha

    most = max(orders(len(grid)))
    for i, (p, q) in enumerate(grid.pairs()):
        d = yield x, p
        if q.sigma == 0 and not evaluate_again:
            return d.x0
        predictor, corrector = orders(len(grid) - 1 - i)
        correction = 0.0
        if last is not None:
            o, before, k, predicted = last
            if o.alpha != 0:
                nodes = [(p, d.x0), *past[1:]][: corrector - 1]
                if nodes:
                    correction = added(k, o, before.x0, p, nodes) - predicted
                else:  # through the new value alone
                    correction = (d.x0 - before.x0) * (p.alpha * (1 - (p.rho / o.rho) ** k)) - predicted
            elif k == 1:
                correction = trapezoid(o, p, before, d)
            if evaluate_again:
                d = yield d.x + correction, p
                correction = 0.0
        if q.sigma == 0:
            return d.x0
        eta = tau(p, q) ** 2
        keep = (q.rho / p.rho) ** eta
        predicted = added(1 + eta, p, d.x0, q, past[: predictor - 1]) if p.alpha != 0 else 0.0
        x = first(Point(q.t, q.alpha, q.sigma * keep), d) + (correction * (q.sigma * keep / p.sigma) + predicted)
        x = noised(x, q.sigma * (1 - keep * keep) ** 0.5, noise, p, q)
        last = (p, d, 1 + eta, predicted)
        if p.alpha != 0:
            past = [(p, d.x0), *past][: most - 1]
    return x


@solver(
    order=2,
    grid="karras",
    aliases=("UniPCMultistepScheduler",),
    reference="UniPC, Zhao et al. 2023 (2302.04867), algorithms 1 and 2, of x0",
    formula="predictor: x0 a polynomial in λ through the latest `order` values; corrector: with the new one too",
    same="order 1 without its corrector: euler; its order 2 predictor (bh2): dpmpp_2m",
    when="Order 3: accurate solutions in 30 evaluations or more.",
)
def unipc(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    order: Literal[1, 2, 3] = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    end: Literal["full", "lowered"] = "full",
) -> Steps:
    """UniP-p predicts, UniC-p corrects; the corrected sequence converges one order higher than `order`.

    `variant` is B(h) = h (bh1) or e^h − 1 (bh2); they differ only in steps with one further value. With `end` "lowered"
    the order of a step is at most the number of steps that are left, itself included, as in other tools.
    """

    def orders(n: int) -> tuple[int, int]:
        return (order, order + 1) if end == "full" else (min(order, n), min(order, n + 1) + 1)

    rule = linear if variant == "bh1" else halved
    return (yield from predictor_corrector(x, grid, noise, orders, rule))


def _is_noisy_middle(grid: Grid, p: Point) -> bool:
    """Whether SA-Solver draws noise at a point: in the middle of the schedule."""
    T = grid.noise.T
    return 0.05 <= p.sigma <= 1 if grid.noise.name == "edm" else 0.2 * T <= p.t <= 0.8 * T


@solver(
    order=2,
    stochastic=True,
    grid="karras",
    aliases=("SASolverScheduler",),
    a1111="SA Solver",
    reference="SA-Solver, Xue et al. 2023 (2309.05019), algorithm 1, of x0",
    formula="predictor: multistep for the reverse SDE with η = τ²; corrector: the same with the new x0 as a node",
    same='tau=0, orders p and p + 1: unipc(variant="bh1", order=p)',
    when="Fresh detail, in 20 evaluations or more, at one evaluation a step.",
)
def sa_solver(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    tau: float = 1.0,
    predictor_order: Literal[1, 2, 3] = 2,
    corrector_order: Literal[2, 3, 4] = 2,
    tau_at: Literal["start", "end"] = "start",
    end: Literal["full", "lowered"] = "full",
    variant: Literal["simple", "exact"] = "simple",
) -> Steps:
    """Stochastic Adams: multistep for the reverse SDE with η = τ², then corrected with the same noise.

    τ applies in the middle of the schedule, 0.2 ≤ t/T ≤ 0.8 (0.05 ≤ σ ≤ 1 on an edm schedule), and is 0 elsewhere. An
    order is the number of values that the polynomial goes through. ComfyUI's choices, where they are not the paper's:
    `tau_at` "end" takes τ at the end of a step; `end` "lowered" goes down to order 1 in the step before the last;
    `variant` "exact" integrates a polynomial through two values exactly too.
    """

    def tau_of(p: Point, q: Point) -> float:
        return tau if _is_noisy_middle(grid, p if tau_at == "start" else q) else 0.0

    def orders(n: int) -> tuple[int, int]:
        if end == "full":
            return predictor_order, corrector_order
        return min(predictor_order, max(n - 1, 1)), min(corrector_order, n)

    rule = linear if variant == "simple" else exponential
    return (yield from predictor_corrector(x, grid, noise, orders, rule, tau_of))


@solver(
    order=2,
    evaluations_per_step=2,
    stochastic=True,
    grid="karras",
    reference="SA-Solver, Xue et al. 2023 (2309.05019), in the mode predict, evaluate, correct, evaluate; ComfyUI",
    formula="sa_solver, and the corrected state is evaluated again: the polynomials go through these values",
    when="As sa_solver, at twice the evaluations. ComfyUI's workflows use this name.",
)
def sa_solver_pece(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    tau: float = 1.0,
    predictor_order: Literal[1, 2, 3] = 3,
    corrector_order: Literal[2, 3, 4] = 4,
) -> Steps:
    """Stochastic Adams with a second evaluation in each step, of the corrected state; else as ComfyUI's sa_solver.

    τ applies as in sa_solver, at the end of a step. The orders go down to 1 in the step before the last.
    """

    def orders(n: int) -> tuple[int, int]:
        return min(predictor_order, max(n - 1, 1)), min(corrector_order, n)

    def tau_of(p: Point, q: Point) -> float:
        return tau if _is_noisy_middle(grid, q) else 0.0

    return (yield from predictor_corrector(x, grid, noise, orders, exponential, tau_of, evaluate_again=True))
