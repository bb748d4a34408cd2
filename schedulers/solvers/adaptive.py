"""Adaptive step sizes, chosen from the values of x: native loop only."""

from __future__ import annotations

import math
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.solver import Steps, solver

from .algebra import exponential, first, halved


@solver(
    order=3,
    evaluations_per_step=3,
    grid="karras",
    a1111="DPM adaptive",
    native_only=True,
    reference="DPM-Solver-12 and -23, Lu et al. 2022 (2206.00927), appendix C; k-diffusion, sample_dpm_adaptive",
    formula="DPM-Solver of orders p and p − 1 over one step; h grows or shrinks by (tolerance/difference)^(1/p)",
    when="To reach a given error instead of a given number of evaluations. Native loop only.",
)
def dpm_adaptive(
    x: Any,
    grid: Grid,
    noise: Any,
    *,
    order: Literal[2, 3] = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    accept_safety: float = 0.81,
) -> Steps:
    """Single-step DPM-Solver of two orders at once; their difference chooses the next step in λ.

    Of the grid, only the two ends and the step to the clean picture are used. The error is the largest in the batch, so
    the steps of an image depend on the other images.
    """
    if isinstance(x, float):
        raise ValueError(
            "dpm_adaptive chooses its steps from the values of x: how many there are is not known before the run"
        )
    p, end, h, before = grid[0], grid[-2], h_init, x
    if p.alpha == 0 and len(grid) > 2:  # λ is −∞ at pure noise: one first-order step
        d = yield x, p
        p = grid[1]
        x = before = first(p, d)
    d = yield x, p
    while p.alpha != 0 and p.lam < end.lam - 1e-5:
        q = end if p.lam + h >= end.lam - 1e-5 else grid.at(lam=p.lam + h)
        step = q.lam - p.lam
        u, v = step / order, step * 2 / 3
        s = grid.at(lam=p.lam + u)
        e = yield first(s, d), s
        low, high = first(q, d), first(q, d) + (e.eps - d.eps) * (q.sigma * halved(-1.0, step, u)[0])
        if order == 3:
            s = grid.at(lam=p.lam + v)
            e = yield first(s, d) + (e.eps - d.eps) * (s.sigma * exponential(-1.0, v, u)[0]), s
            low, high = high, first(q, d) + (e.eps - d.eps) * (q.sigma * exponential(-1.0, step, v)[0])
        tolerance = (rtol * low.abs().maximum(before.abs())).clamp(min=atol)
        error = float(((high - low) / tolerance).square().reshape(len(x), -1).mean(1).sqrt().max())
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / order) - 1) if error < math.inf else math.inf
        if factor >= accept_safety:  # a step with a non-finite state is accepted too, so that the loop ends
            before, x, p = low, high, q
            d = yield x, p
        h = h * factor
    return d.x0
