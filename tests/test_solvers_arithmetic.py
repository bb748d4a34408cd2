"""Every solver on every kind of model, for 1 to 1000 steps and from every evaluation: finite, and the loops agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import schedulers
from schedulers import NoiseSchedule, Scheduler

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


def walk(s: Scheduler, begin: int = 0) -> Tensor:
    """The loop of a pipeline from an evaluation on, over a view of the times, without set_begin_index."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 2, 2, generator=generator) * s.init_noise_sigma
    for t in s.timesteps[begin:]:
        x = s.step(network(s.scale_model_input(x, t), t), t, x, generator=generator)[0]
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
        native = s.sample(network, x, steps, generator)
        assert result.isfinite().all()
        torch.testing.assert_close(result, native, rtol=2e-3, atol=1e-3 * max(1.0, float(native.abs().max())))


@pytest.mark.parametrize("name", INSIDE)
def test_a_thousand_steps(name: str) -> None:
    """On the schedule with an end at pure noise, where a table has a step for each of its times."""
    noise, prediction = MODELS["zero terminal SNR"]
    s = schedulers.get(name, noise=noise, prediction=prediction)
    assert s.sample(network, torch.randn(1, 2, generator=torch.Generator().manual_seed(0)), 1000).isfinite().all()


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
