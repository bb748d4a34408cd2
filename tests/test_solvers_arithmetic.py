"""Every solver on every kind of model, for 1 to 1000 steps and from every evaluation: finite, and the loops agree."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import schedulers
from schedulers import Grid, NoiseSchedule, Point, Scheduler
from schedulers.grids import build
from schedulers.prediction import Denoised, bind
from schedulers.solver import run

SD = NoiseSchedule.scaled_linear()
MODELS = {  # a noise schedule and a prediction
    "epsilon": (SD, "epsilon"),
    "sample": (SD, "sample"),
    "v": (SD, "v_prediction"),
    "zero terminal SNR": (SD.zero_terminal_snr(), "v_prediction"),
    "cosine": (NoiseSchedule.cosine(), "v_prediction"),
    "flow": (NoiseSchedule.flow(), "flow_prediction"),
    "flow, shift 3": (NoiseSchedule.flow(3.0), "flow_prediction"),
    "flow with an end": (NoiseSchedule.flow(3.0, terminal=0.02), "flow_prediction"),
    "edm": (NoiseSchedule.edm(), "edm"),
}
INSIDE = [name for name in schedulers.names() if not schedulers.info(name).native_only]


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * 0.5


def pair(x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
    """The outputs with and without a prompt, for CFG++."""
    return network(x, t), torch.tanh(x) * 0.4


def walk(s: Scheduler, begin: int = 0) -> Tensor:
    """The loop of a pipeline from an evaluation on, over a view of the times, without set_begin_index."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 2, 2, generator=generator) * s.init_noise_sigma
    for t in s.timesteps[begin:]:
        output, without = pair(s.scale_model_input(x, t), t)
        x = s.step(output, t, x, generator=generator, without=without if s.solver.cfg_pp else None)[0]
    return x


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", INSIDE)
def test_every_number_of_steps(name: str, model: str) -> None:
    noise, prediction = MODELS[model]
    s = schedulers.get(name, noise=noise, prediction=prediction)
    for steps in (1, 2, 3, 50):
        s.set_timesteps(steps)
        assert len(s.timesteps) == s.nfe(steps)
        result = walk(s)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, 2, 2, generator=generator) * s.init_noise_sigma
        native = s.sample(pair if s.solver.cfg_pp else network, x, steps, generator)
        assert result.isfinite().all()
        torch.testing.assert_close(result, native, rtol=2e-3, atol=1e-3 * max(1.0, float(native.abs().max())))


@cache
def thousand(grid: str, model: str) -> Grid:
    """The grid of 1000 steps, built once, as the solvers share it."""
    return build(grid, MODELS[model][0], 1000)


@pytest.mark.parametrize("name", INSIDE)
def test_a_thousand_steps(name: str) -> None:
    """On numbers in place of tensors, because there are 400,000 evaluations."""
    for model, (noise, prediction) in MODELS.items():
        s = schedulers.get(name, noise=noise, prediction=prediction)
        bound = bind(prediction, noise)

        def denoise(x: float, p: Point) -> Denoised:
            without = 0.4 * math.tanh(x) if s.solver.cfg_pp else None  # noqa: B023
            return Denoised(x, 0.5 * math.tanh(x), p, bound, without=without)  # noqa: B023

        grid = thousand(s.grid_name, model)
        result, nfe = run(s.solve(s.init_noise_sigma * 0.7, grid, lambda p, q: 0.3), denoise)
        assert math.isfinite(result)
        assert nfe == len(s.evaluations(grid))


@pytest.mark.parametrize("model", ["epsilon", "zero terminal SNR", "flow, shift 3"])
@pytest.mark.parametrize("name", [name for name in INSIDE if not schedulers.info(name).upwards])
def test_every_beginning(name: str, model: str) -> None:
    noise, prediction = MODELS[model]
    s = schedulers.get(name, noise=noise, prediction=prediction)
    s.set_timesteps(4)
    for begin in range(len(s.timesteps)):
        s.set_timesteps(4)
        assert walk(s, begin).isfinite().all()
        assert s.step_index == len(s.timesteps)
