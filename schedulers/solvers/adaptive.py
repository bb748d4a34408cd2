"""Single steps of DPM-Solver of orders 1 to 3, of even length in λ or of lengths chosen from the values of x."""

from __future__ import annotations

import math
from typing import Any, Literal

from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.prediction import Denoised
from schedulers.solver import Steps, solver

from .algebra import exponential, first, halved


def single_step(d: Denoised, p: Point, q: Point, grid: Grid, order: int) -> Steps:
    """DPM-Solver's step p → q from the first evaluation d: its states of orders 1 … `order`, which share evaluations.

    The second evaluation lies at 1/`order` of the step in λ, the third at 2/3.
    """
    h, states = q.lam - p.lam, [first(q, d)]
    if order > 1:
        s = grid.at(lam=p.lam + h / order)
        e = yield first(s, d), s
        states.append(first(q, d) + (e.eps - d.eps) * (q.sigma * halved(-1.0, h, h / order)[0]))
    if order == 3:
        s = grid.at(lam=p.lam + h * 2 / 3)
        e = yield first(s, d) + (e.eps - d.eps) * (s.sigma * exponential(-1.0, h * 2 / 3, h / 3)[0]), s
        states.append(first(q, d) + (e.eps - d.eps) * (q.sigma * exponential(-1.0, h, h * 2 / 3)[0]))
    return states


@solver(
    order=2,
    grid="exponential",
    a1111="DPM fast",
    aliases=("k_dpm_fast",),
    native_only=True,
    reference="DPM-Solver-fast, Lu et al. 2022 (2206.00927), section 3.4; k-diffusion, sample_dpm_fast",
    formula="DPM-Solver of orders 3, 3, …, 3 and 2, 1 or the rest, over m even steps in λ; n evaluations for n steps",
    when="To match pictures made with DPM fast. deis has less error at equal cost. Native loop only.",
)
def dpm_fast(x: Any, grid: Grid, noise: Any) -> Steps:
    """Take single steps of third order over even steps in λ, and lower ones at the end, so that all evaluations count.

    Of the grid, only the two ends, the number of steps and the step to the clean picture are used: the plan is for the
    whole run.
    """
    p, end, left = grid[0], grid[-2], len(grid) - 2  # evaluations before the last
    if p.alpha == 0 and left > 0:  # λ is −∞ at pure noise: one first-order step
        d = yield x, p
        x, p, left = first(grid[1], d), grid[1], left - 1
    m = left // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if left % 3 == 0 and left else [3] * (m - 1) + [left % 3]
    start = p
    for i, order in enumerate(orders if left else (), 1):
        d = yield x, p
        q = end if i == len(orders) else grid.at(lam=start.lam + (end.lam - start.lam) * i / m)
        x = (yield from single_step(d, p, q, grid, order))[-1]
        p = q
    d = yield x, p
    return d.x0


@solver(
    order=3,
    evaluations_per_step=3,
    grid="karras",
    aliases=("k_dpm_ad",),
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
        low, high = (yield from single_step(d, p, q, grid, order))[-2:]
        tolerance = (rtol * low.abs().maximum(before.abs())).clamp(min=atol)
        error = float(((high - low) / tolerance).square().reshape(len(x), -1).mean(1).sqrt().max())
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / order) - 1) if error < math.inf else math.inf
        if factor >= accept_safety:  # a step with a non-finite state is accepted too, so that the loop ends
            before, x, p = low, high, q
            d = yield x, p
        h = h * factor
    return d.x0
