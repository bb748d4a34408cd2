"""Runs of solvers on models with an exact solution, in float64, shared by the solver tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from schedulers import grids
from schedulers.exact import Mixture
from schedulers.grid import Grid
from schedulers.noise import NoiseSchedule, Point
from schedulers.prediction import Denoised, target
from schedulers.solver import SOLVERS, run

PREDICTIONS = {"scaled_linear": "epsilon", "flow": "flow_prediction", "edm": "epsilon"}


def sample(
    name: str,
    grid: Grid,
    x: Tensor,
    model: Mixture,
    prediction: str | None = None,
    noise: Callable[[Point, Point], Tensor] | None = None,
    exact_start: int = 0,
    **options: Any,
) -> tuple[Tensor, int]:
    """(the solver's result, its evaluations). The exact solution replaces the first `exact_start` states."""
    prediction = prediction or PREDICTIONS.get(grid.noise.name, "epsilon")
    count, begin = 0, x

    def denoise(state: Tensor, p: Point) -> Denoised:
        nonlocal count
        if 0 < count < exact_start:
            state = model.solve(begin, grid[0], p, intervals=4)
        count += 1
        x0, eps = model.denoise(state, p.alpha, p.sigma)
        return Denoised(state, target(prediction, p, x0, eps), p, prediction)

    return run(SOLVERS[name].function(x, grid, noise, **options), denoise)


def from_prior(noise: NoiseSchedule, model: Mixture, count: int) -> Tensor:
    """States at the noisiest point, from its exact distribution."""
    generator = torch.Generator().manual_seed(1)
    p, elements = noise.noisiest, model.means.shape[1]
    z = torch.randn(count, elements, generator=generator, dtype=torch.float64)
    return p.alpha * model.draw(count, generator) + p.sigma * z


def answer(p: Point, last: Point, x: Tensor, model: Mixture) -> Tensor:
    """The exact solution from p to the last noisy point, then the model's x0 there."""
    return model.denoise(model.solve(x, p, last), last.alpha, last.sigma)[0]


@cache
def _start_and_answer(schedule: str, model: Mixture, last: Point) -> tuple[Tensor, Tensor]:
    noise = NoiseSchedule.named(schedule)
    x = from_prior(noise, model, 24)
    return x, answer(noise.noisiest, last, x, model)


def errors(
    name: str, schedule: str, grid: str, steps: tuple[int, ...], model: Mixture, **how: Any
) -> list[tuple[int, float]]:
    """(evaluations, median distance to the exact solution) for each number of steps."""
    results = []
    for n in steps:
        points = grids.build(grid, NoiseSchedule.named(schedule), n)
        x, exact = _start_and_answer(schedule, model, points[-2])
        result, nfe = sample(name, points, x, model, **how)
        results.append((nfe, (result - exact).norm(dim=1).median().item()))
    return results


def order(results: list[tuple[int, float]]) -> float:
    """The order of convergence by evaluations, between the first and the last."""
    (n, e), (m, f) = results[0], results[-1]
    return math.log(e / f) / math.log(m / n)


def moments(name: str, grid: Grid, model: Mixture, **options: Any) -> tuple[float, float, int]:
    """(mean, variance, number of noises) of the result on 1-D Gaussian data, exactly.

    A solver is affine in its start and its noises there: one run with a batch of basis vectors gives all factors.
    """
    mean, s, p = model.means[0, 0].item(), model.deviations[0].item(), grid[0]

    def factors(noises: int) -> tuple[Tensor, int]:
        x = torch.zeros(2 + noises, 1, dtype=torch.float64)
        x[1] = 1
        drawn = 0

        def noise(p: Point, q: Point) -> Tensor:
            nonlocal drawn
            z = torch.zeros_like(x)
            if drawn < noises:
                z[2 + drawn] = 1
            drawn += 1
            return z

        return sample(name, grid, x, model, noise=noise, **options)[0][:, 0], drawn

    noises = factors(0)[1]
    result, _ = factors(noises)
    offset, slope, rest = result[0], result[1] - result[0], result[2:] - result[0]
    variance = slope**2 * ((p.alpha * s) ** 2 + p.sigma**2) + (rest**2).sum()
    return (offset + slope * p.alpha * mean).item(), variance.item(), noises
