"""Schedulers of diffgen in diffusers and schedulers of diffusers in diffgen: configuration, files, native loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipeline_loop import MIXTURE, SD, loop, seeds, start
from torch import Tensor

import schedulers
from schedulers import NoiseSchedule, Scheduler, explicit
from schedulers.for_diffusers import DiffgenScheduler, for_diffusers, from_diffusers


def test_edm_scales_its_input_and_is_diffusers() -> None:
    theirs = diffusers.EDMEulerScheduler(sigma_data=0.7)
    noise, prediction = schedulers.from_diffusers_config({"_class_name": "EDMEulerScheduler", **theirs.config})
    s = schedulers.get("euler", noise=noise, prediction=prediction, grid="karras")
    states: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        states.append(x)
        return torch.sin(x + t.reshape(-1, 1, 1, 1))

    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)) * theirs.init_noise_sigma
    expected = from_diffusers(theirs).sample(network, x, 8)
    assert s.init_noise_sigma == pytest.approx(theirs.init_noise_sigma)
    torch.testing.assert_close(s.sample(network, x, 8), expected, rtol=1e-4, atol=1e-4)
    s.set_timesteps(8)
    torch.testing.assert_close(loop(s, network, x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[8], states[0])
    torch.testing.assert_close(s.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)


SAVED = {
    "plain": {"name": "dpmpp_2m", "grid": "karras"},
    "options": {"name": "euler", "eta": 0.5, "clip_sample": True},
    "times": {"name": "unipc", "order": 3, "grid": [999, 600, 10]},
    "model_times": {"name": "heun", "grid": explicit(sigmas=[10.0, 1.0], model_times=[900, 500])},
    "table": {"name": "euler", "noise": NoiseSchedule.from_betas([0.1, 0.2, 0.3]), "grid": "linspace"},
    "zero_snr": {"name": "euler", "noise": SD.zero_terminal_snr(), "prediction": "v_prediction"},
    "flow": {"name": "heun", "noise": NoiseSchedule.flow(3.0), "prediction": "flow_prediction"},
    "dynamic": {
        "name": "euler",
        "noise": NoiseSchedule.flow(dynamic={"max_shift": 2.0}),
        "prediction": "flow_prediction",
    },
    "edm": {"name": "edm", "noise": NoiseSchedule.edm(0.01, 50.0, 1.0), "prediction": "edm_v"},
}


@pytest.mark.parametrize("choice", SAVED.values(), ids=SAVED)
def test_saved_and_loaded(choice: dict[str, Any], tmp_path: Path) -> None:
    s = schedulers.get(**choice)
    for_diffusers(s).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DiffgenScheduler"
    again = DiffgenScheduler.from_pretrained(tmp_path)
    assert isinstance(again, Scheduler)
    assert (again.name, again.options, again.limits, again.noise, again.prediction, again.grid_name, again.config) == (
        s.name, s.options, s.limits, s.noise, s.prediction, s.grid_name, for_diffusers(s).config,
    )  # fmt: skip
    steps = getattr(s.points, "steps", 3)
    for each in (s, again):
        each.set_timesteps(steps, mu=1.0)
    torch.testing.assert_close(again.timesteps, s.timesteps, rtol=0, atol=0)
    assert again.init_noise_sigma == s.init_noise_sigma


@pytest.mark.parametrize(
    "noise",
    [SD, SD.zero_terminal_snr(), NoiseSchedule.linear(), NoiseSchedule.cosine(), NoiseSchedule.from_betas([0.1, 0.9])],
    ids=repr,
)
def test_a_scheduler_of_diffusers_from_the_configuration(noise: NoiseSchedule) -> None:
    """`DDIMScheduler.from_config(pipe.scheduler.config)` has the noise and the prediction of the model."""
    s = schedulers.get("heun", noise=noise, prediction="v_prediction")
    for config in (s.config, for_diffusers(s).config):
        theirs = diffusers.DDIMScheduler.from_config(config)
        expected = torch.tensor(noise.alphas_cumprod, dtype=torch.float32)
        torch.testing.assert_close(theirs.alphas_cumprod, expected, rtol=1e-3, atol=1e-7)
        assert theirs.config.prediction_type == "v_prediction"
        read, prediction = schedulers.from_diffusers_config(config)
        assert read.alphas_cumprod == pytest.approx(noise.alphas_cumprod)
        assert prediction == "v_prediction"
    again = DiffgenScheduler.from_config(for_diffusers(s).config)
    assert (again.name, again.noise, again.options) == (s.name, s.noise, s.options)


def test_a_flow_of_diffusers_from_the_configuration() -> None:
    flow = schedulers.get("heun", noise=NoiseSchedule.flow(3.0), prediction="flow_prediction")
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow.config).config.shift == 3.0
    assert diffusers.UniPCMultistepScheduler.from_config(flow.config).config.flow_shift == 3.0
    assert schedulers.from_diffusers_config(flow.config) == (flow.noise, "flow_prediction")


def test_a_function_cannot_be_saved() -> None:
    s = schedulers.get("euler", grid=lambda noise, n: [noise.at(t=999.0 - 10 * k) for k in range(n)])
    assert s.grid(3)[1].t == 989
    with pytest.raises(ValueError, match="is a function, which cannot be saved"):
        for_diffusers(s)


@pytest.mark.parametrize(
    ("theirs", "name", "options"),
    [
        ("DDIMScheduler", "euler", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("EulerDiscreteScheduler", "euler", {"timestep_spacing": "trailing"}),
        ("HeunDiscreteScheduler", "heun", {"timestep_spacing": "trailing"}),
        ("DDPMScheduler", "ddpm", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("FlowMatchEulerDiscreteScheduler", "euler", {"shift": 1.0}),
    ],
)
def test_a_scheduler_of_diffusers_in_the_native_loop(theirs: str, name: str, options: dict[str, Any]) -> None:
    flow = theirs.startswith("Flow")
    table = {} if flow else {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    foreign = from_diffusers(getattr(diffusers, theirs)(**table, **options))
    kind = {"noise": "flow", "prediction": "flow_prediction", "grid": "linspace"} if flow else {"grid": "trailing"}
    ours = schedulers.get(name, **kind)
    network = MIXTURE.denoiser(ours.noise, ours.prediction)
    assert foreign.nfe(10) == ours.nfe(10)
    z = start(ours) / ours.init_noise_sigma
    expected = foreign.sample(network, foreign.start(z, 10), 10, seeds(3))
    # theirs begins with σ·z where the state's deviation is √(σ² + 1): 0.2 % of the first state
    torch.testing.assert_close(ours.sample(network, ours.start(z, 10), 10, seeds(3)), expected, rtol=0.02, atol=0.02)
