"""Every solver passes the conformance check, and each fault that the check looks for fails it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import schedulers
from schedulers.solver import SOLVERS, solver
from schedulers.testing import check_solver


@pytest.mark.parametrize("name", schedulers.names())
def test_every_solver_conforms(name: str) -> None:
    check_solver(name)


def broken(kind: str, stochastic: bool = False, order: int = 1) -> Any:
    """An euler solver with one fault."""

    def function(x: Any, grid: Any, noise: Any, *, flag: int = 1) -> Any:
        for i, (p, q) in enumerate(grid.pairs()):
            mine = x
            d = yield x, p
            x = q.alpha * d.x0 + q.sigma * d.eps
            if kind == "own state" and q.sigma != 0:
                x = (q.sigma / p.sigma) * mine + (q.alpha - q.sigma * p.alpha / p.sigma) * d.x0
            if kind == "divides by alpha":
                x = (d.x / p.alpha + (q.rho - p.rho) * d.eps) * q.alpha
            if kind == "reads a value" and float(x if isinstance(x, float) else x.sum()) > 1e9:
                x = x * 1.0
            if kind == "asks by value" and not isinstance(x, float) and i == 0:
                d = yield x, q if q.sigma != 0 else p
            if kind == "last noise":
                x = x + noise(p, q) * (q.sigma + 0.1)
            if kind == "own noise" and not isinstance(x, float):
                x = x + torch.randn(x.shape, device=x.device) * q.sigma
            if kind == "undeclared noise" and q.sigma != 0:
                x = x + noise(p, q) * 0.1
            if kind == "couples images" and not isinstance(x, float) and q.sigma != 0:
                x = x + x.mean() * 0.01
            if kind == "float64" and not isinstance(x, float):
                x = x.double()
            if kind == "lags" and q.sigma != 0:
                x = x * 1.01
        return None if kind == "returns nothing" else x

    function.__name__ = f"broken_{kind.replace(' ', '_')}"
    return solver(order=order, reference="none", stochastic=stochastic)(function)


@pytest.mark.parametrize(
    ("kind", "extra", "says"),
    [
        ("divides by alpha", {}, "finds_the_picture: "),
        ("reads a value", {}, "reads_nothing: "),
        ("asks by value", {}, "dry_run: "),
        ("last noise", {"stochastic": True}, "random: draws noise for the step to σ = 0"),
        ("own noise", {}, "random: the same generators give two results"),
        ("undeclared noise", {}, "random: declared stochastic=False, and draws noise 4 times"),
        ("nothing at all", {"stochastic": True}, "random: declared stochastic=True, and draws noise 0 times"),
        ("couples images", {}, "random: an image depends on the other images of its batch"),
        ("float64", {}, "must be a float32 tensor"),
        ("returns nothing", {}, "must be a float32 tensor"),
        ("lags", {}, "order: declared 1, measured"),
        ("nothing at all", {"order": 2}, "order: declared 2, measured"),
        ("own state", {}, "takes_the_state_as_it_comes: "),
    ],
)
def test_a_solver_with_a_fault_does_not_conform(kind: str, extra: dict[str, Any], says: str) -> None:
    function = broken(kind, **extra)
    try:
        with pytest.raises(AssertionError) as excinfo:
            check_solver(function)
    finally:
        del SOLVERS[function.__name__]
    assert says in str(excinfo.value), str(excinfo.value)


def test_an_undecorated_function_does_not_conform() -> None:
    with pytest.raises(AssertionError, match="decorate it"):
        check_solver(lambda x, grid, noise: x)
