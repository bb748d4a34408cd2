"""The noise of a run: the starting state, added noise, the noise of stochastic solvers."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from pipeline_loop import INSIDE, KINDS, MIXTURE, SD, loop, seeds, start

import schedulers
from schedulers import NoiseSchedule, explicit
from schedulers.draws import normal


def test_each_image_starts_from_its_own_noise_at_the_level_of_the_first_point() -> None:
    noise = normal((3, 2, 4), seeds(3))
    assert noise.dtype is torch.float32
    for row, generator in zip(noise, seeds(3), strict=True):
        assert torch.equal(row, torch.randn(2, 4, generator=generator))
    one = torch.Generator().manual_seed(0)
    assert torch.equal(normal((3, 2), one), torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    for kind in ("scaled_linear", "linear", "cosine"):  # variance preserving: not a bit changes
        assert torch.equal(schedulers.get("euler", noise=kind, prediction="v_prediction").start(noise), noise)
    s = schedulers.get("euler", noise=NoiseSchedule.edm(sigma_max=3.0), prediction="edm")
    torch.testing.assert_close(s.start(noise, 5), noise * math.sqrt(10))
    grid = s.grid(5)
    assert torch.equal(s.start(noise, grid[2:]), noise * math.hypot(1.0, grid[2].sigma))


@pytest.mark.parametrize(
    ("kind", "sigma"), [("sd", 1.0), ("zero_snr", 1.0), ("flow", 1.0), ("edm", math.hypot(80.0, 1.0))]
)
def test_the_starting_noise(kind: str, sigma: float) -> None:
    noise, prediction = {**KINDS, "edm": (NoiseSchedule.edm(), "edm")}[kind]
    assert schedulers.get("euler", noise=noise, prediction=prediction).init_noise_sigma == pytest.approx(sigma)


def test_noise_is_added_as_diffusers_adds_it() -> None:
    x, z = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 400, 999])
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    torch.testing.assert_close(
        schedulers.get("euler").add_noise(x, z, t), theirs.add_noise(x, z, t), rtol=1e-5, atol=1e-5
    )
    flow = schedulers.get("euler", noise="flow", prediction="flow_prediction")
    mixed = flow.scale_noise(x, torch.tensor([250.0]), z)
    torch.testing.assert_close(mixed, 0.75 * x + 0.25 * z)
    assert flow.scale_noise(x.half(), torch.tensor([250.0]), z.half()).dtype == torch.float16


def test_noise_is_added_at_the_level_and_not_at_the_model_time() -> None:
    """A tuned grid in image-to-image: the state is at its level, whatever time the network receives."""
    s = schedulers.get("euler", grid=explicit(sigmas=[10.0, 2.0, 0.5], model_times=[980, 600, 300]))
    s.set_timesteps(3)
    s.set_begin_index(1)
    x, z = torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    assert float(s.add_noise(x, z, s.timesteps[1:2])[0, 0, 0, 0]) == pytest.approx(5**-0.5)
    s.step(z, s.timesteps[1], x)
    assert float(s.add_noise(x, z, s.timesteps[2:])[0, 0, 0, 0]) == pytest.approx(1.25**-0.5)


STOCHASTIC = [name for name in INSIDE if schedulers.info(name).stochastic]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    s = schedulers.get(name)
    network = MIXTURE.denoiser(SD)
    s.set_timesteps(5)
    x = start(s, 4)
    batch = loop(s, network, x, generator=seeds(4))
    s.set_timesteps(5)
    alone = loop(s, network, x[2:3], generator=seeds(4)[2:3])
    torch.testing.assert_close(batch[2:3], alone, rtol=1e-5, atol=1e-5)
    s.set_timesteps(5)
    one = loop(s, network, x[2:3], generator=seeds(4)[2])  # one generator, not a list
    assert torch.equal(alone, one)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_last_step_adds_no_noise(name: str) -> None:
    s = schedulers.get(name)
    x0 = torch.linspace(-1, 1, 24).reshape(3, 2, 2, 2)
    s.set_timesteps(4)
    p = s._evaluations[-1]
    s.set_begin_index(len(s.timesteps) - 1)
    result = loop(s, lambda x, t: (x - p.alpha * x0) / p.sigma, p.alpha * x0 + p.sigma, len(s.timesteps) - 1, seeds(3))
    tolerance = 1e-5 if name != "lcm" else 1e-3  # its c_skip is not quite 0
    torch.testing.assert_close(result, x0, rtol=tolerance, atol=tolerance)


def test_generators_must_be_as_many_as_images() -> None:
    s = schedulers.get("ddpm")
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        s.sample(MIXTURE.denoiser(SD), start(s), 4, seeds(2))
