"""The losses of diffusers' training scripts with our scheduler in place of theirs: the same numbers.

The scripts ask a scheduler for noisy latents, targets, signal-to-noise ratios, and the lists of its times and levels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

import schedulers
from schedulers.for_diffusers import DiffgenScheduler, for_diffusers

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x + (t.float() / 100).reshape(-1, 1, 1, 1))


def table_loss(scheduler: Any, prediction: str | None, gamma: float | None) -> Tensor:
    """text_to_image for Stable Diffusion 1 and SDXL: `prediction` is set on the scheduler, `gamma` is Min-SNR's."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 8, 4, 6, 6, generator=generator)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (8,), generator=generator)
    noisy = scheduler.add_noise(x, noise, t)
    if prediction is not None:
        scheduler.register_to_config(prediction_type=prediction)
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x, noise, t) if is_v else noise
    errors = (network(noisy, t) - target).square().mean((1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, t)
        errors = errors * snr.clamp(max=gamma) / (snr + 1 if is_v else snr)
    return errors


@pytest.mark.parametrize("prediction", [None, "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("form", ["plain", "saved", "read"])
def test_losses_of_stable_diffusion(prediction: str | None, gamma: float | None, form: str) -> None:
    theirs = diffusers.DDPMScheduler(**TABLE)
    ours = {
        "plain": lambda: schedulers.get("ddpm"),
        "saved": lambda: for_diffusers(schedulers.get("dpmpp_2m", grid="karras")),
        "read": lambda: DiffgenScheduler.from_config(theirs.config),
    }[form]()
    result, expected = (table_loss(each, prediction, gamma) for each in (ours, theirs))
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=1e-6)
    assert ours.prediction == (prediction or "epsilon")


def flow_loss(scheduler: Any, weighting: str, precondition: bool) -> Tensor:
    """Stable Diffusion 3 and Flux: times drawn by a density, levels looked up in the scheduler's lists."""
    scheduler = copy.deepcopy(scheduler)
    torch.manual_seed(0)
    x, noise = torch.randn(2, 8, 4, 6, 6)
    u = compute_density_for_timestep_sampling(weighting, batch_size=8, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    t = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    indices = [(scheduler.timesteps == one).nonzero().item() for one in t]
    sigma = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * noise
    output, target = network(noisy, t), noise - x
    if precondition:
        output, target = noisy - sigma * output, x
    weight = compute_loss_weighting_for_sd3(weighting, sigma)
    return (weight * (output - target).square()).reshape(8, -1).mean(1)


FLOWS: dict[str, Callable[[], Any]] = {
    "Stable Diffusion 3": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Flux": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "Flux schnell": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("model", FLOWS)
@pytest.mark.parametrize("weighting", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("precondition", [False, True])
def test_losses_of_flows(model: str, weighting: str, precondition: bool) -> None:
    theirs = FLOWS[model]()
    noise, prediction = schedulers.from_diffusers_config(theirs.config)
    for ours in (
        schedulers.get("heun", noise=noise, prediction=prediction),
        DiffgenScheduler.from_config(theirs.config),
    ):
        result, expected = (flow_loss(each, weighting, precondition) for each in (ours, theirs))
        torch.testing.assert_close(result, expected, rtol=2e-4, atol=1e-6)
