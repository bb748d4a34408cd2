"""What the linear multistep solvers share: one evaluation a step, with the outputs of earlier steps used again.

The first-order step takes x0 (or ε) as constant. A multistep method takes it as a polynomial through the latest values,
integrated along λ = ln(α/σ) or along ρ = σ/α. A run that starts mid-way has no history, so it starts at first order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.solver import Steps

from .algebra import damped, differences, exponential, first, halved, heun_correction, noised

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
    last: str = "x0",
) -> Steps:
    """x' = α'·x0 + σ'·(keep·ε + √(1 − keep²)·z) + Σ c_j·(f_j − f), f the latest `order` values of x0 or eps.

    The step to σ = 0 is x' = x0, or with `last` "extrapolated" a step as the others. A value at α = 0 is not used as a
    node, because λ is −∞ there. If `weights` gives one number more than there are earlier values, it is that of f.
    """
    past: list[tuple[Point, Any]] = []
    for p, q in grid.pairs():
        d = yield x, p
        if q.sigma == 0 and last == "x0":
            return d.x0
        kept, now = keep(p, q), getattr(d, of)
        x = first(Point(q.t, q.alpha, q.sigma * kept), d)
        if past:
            points, values = zip(*past, strict=True)
            c = weights(p, q, list(points))
            x = x + differences(c[: len(values)], values, now)
            x = x + now * c[-1] if len(c) > len(values) else x
        if heun_first and p is grid[0] and len(grid) - 1 == grid.total:
            e = yield x, q
            x = x + heun_correction(grid, p, q, d, e)
        x = noised(x, q.sigma * (1 - kept * kept) ** 0.5 * s_noise, noise, p, q)
        if p.alpha != 0:
            past = [(p, now), *past][: order - 1]
    return x


def along_lambda(of: str, eta: float = 0.0, second_order: str = "heun", third_order: str = "full") -> Weights:
    """The weights of polynomials in λ: of x0 along the ODE, or the SDE with η, or of ε.

    `second_order` is the rule for one further value: "heun" is exact, "midpoint" the form of DPM-Solver++.
    `third_order` is the rule for two: "full" is exact, "half" takes half of the second difference.
    """
    k = 1 + eta if of == "x0" else -1.0

    def weights(p: Point, q: Point, past: list[Point]) -> tuple[Any, ...]:
        rule = halved if second_order == "midpoint" and len(past) == 1 else exponential
        rule = damped if third_order == "half" and len(past) == 2 else rule
        scale = q.alpha if of == "x0" else q.sigma
        return tuple(scale * c for c in rule(k, q.lam - p.lam, *(o.lam - p.lam for o in past)))

    return weights


def power(eta: float) -> Callable[[Point, Point], Any]:
    """The factor of ε in a step of the reverse SDE with η: (ρ'/ρ)^η, SDE-DPM-Solver++ eq. 18 for η = 1."""
    return lambda p, q: (q.rho / p.rho) ** eta
