"""Gradient estimation: ε is extrapolated from the last two steps."""

from __future__ import annotations

from typing import Any

from schedulers.grid import Grid
from schedulers.solver import Steps, solver

from .algebra import first


@solver(
    order=1,
    grid="karras",
    aliases=("euler_ge",),
    reference="Permenter and Yuan 2023 (2306.04848), algorithm 2; ComfyUI, sample_gradient_estimation",
    formula="x' = first + (γ − 1)·(ε − ε₋)·(σ' − α'·σ/α), ₋ the step before",
    same="gamma=1: euler; gamma=1.5 on even steps in σ/α: ipndm(order=2)",
    when="Four evaluations. With more, ipndm has less error.",
)
def gradient_estimation(x: Any, grid: Grid, noise: Any, *, gamma: float = 2.0) -> Steps:
    """Take an euler step along ε extrapolated from the step before: γ·ε + (1 − γ)·ε₋."""
    before: Any = None
    for p, q in grid.pairs():
        d = yield x, p
        x = first(q, d)
        if before is not None and q.sigma != 0:
            x = x + (d.eps - before) * ((gamma - 1) * (q.sigma - q.alpha * p.rho))
        before = d.eps if p.alpha != 0 else None
    return x
