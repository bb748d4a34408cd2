"""Noise schedules: against their formulas, against diffusers' tables, and round trips."""

from __future__ import annotations

import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import schedulers
from schedulers import NoiseSchedule, from_diffusers_config

TABLES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "laplace": NoiseSchedule.laplace(),
    "short": NoiseSchedule.from_betas([0.1, 0.2, 0.5]),
    "zero_snr": NoiseSchedule.scaled_linear().zero_terminal_snr(),
    "one_before_noise": NoiseSchedule.from_alphas_cumprod([0.5, 0.0]),
}
CONTINUOUS = {"flow": NoiseSchedule.flow(), "flow_shift": NoiseSchedule.flow(3.0), "edm": NoiseSchedule.edm()}
ALL = TABLES | CONTINUOUS


@pytest.mark.parametrize("noise", TABLES.values(), ids=TABLES)
def test_tables_are_variance_preserving_and_exact_at_integer_times(noise: NoiseSchedule) -> None:
    for t, bar in enumerate(noise.alphas_cumprod):
        assert noise.alpha(t) ** 2 == pytest.approx(bar, abs=1e-14, rel=1e-12)
        assert noise.alpha(t) ** 2 + noise.sigma(t) ** 2 == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
@given(u=st.floats(0, 1))
def test_time_and_noise_level_are_inverse(noise: NoiseSchedule, u: float) -> None:
    t = noise.t_min + u * (noise.t_max - noise.t_min)
    p = noise.at(t=t)
    for again in (noise.at(lam=p.lam), noise.at(level=noise.level(p))):
        assert again.t == pytest.approx(t, abs=1e-9 * max(noise.t_max, 1))
        assert again.sigma * p.alpha == pytest.approx(p.sigma * again.alpha, rel=1e-9)


@pytest.mark.parametrize(
    ("noise", "level"),
    [(NoiseSchedule.edm(), 0.75), (NoiseSchedule.flow(3.0), 0.75), (NoiseSchedule.scaled_linear(), 0.75)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_noise_level_is_sigma_on_a_flow_and_sigma_over_alpha_elsewhere(noise: NoiseSchedule, level: float) -> None:
    p = noise.at(level=level)
    assert (p.sigma if noise.name == "flow" else p.sigma / p.alpha) == pytest.approx(level, rel=1e-12)
    assert noise.level(p) == pytest.approx(level, rel=1e-12)
    assert p.norm == pytest.approx(math.sqrt(p.alpha**2 + p.sigma**2))


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
def test_tensors_give_what_floats_give(noise: NoiseSchedule) -> None:
    t = torch.linspace(noise.t_min, noise.t_max, 41, dtype=torch.float64)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    floats = [noise.at(t=float(x)) for x in t]
    torch.testing.assert_close(
        alpha, torch.tensor([p.alpha for p in floats], dtype=torch.float64), rtol=1e-13, atol=1e-15
    )
    torch.testing.assert_close(
        sigma, torch.tensor([p.sigma for p in floats], dtype=torch.float64), rtol=1e-13, atol=1e-15
    )
    lam = torch.tensor([p.lam for p in floats], dtype=torch.float64)
    torch.testing.assert_close(noise.at(lam=lam.reshape(1, 41)).t, t.reshape(1, 41), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
def test_numbers_of_every_kind(noise: NoiseSchedule) -> None:
    """Tensors of integers or half precision give float64; NumPy's numbers work too."""
    for t in (torch.tensor([0, 1]), torch.tensor([0.0, 1.0]).half()):
        for level in (noise.alpha, noise.sigma):
            expected = torch.tensor([level(0.0), level(1.0)], dtype=torch.float64)
            torch.testing.assert_close(level(t), expected, rtol=1e-13, atol=1e-15)
    assert noise.alpha(np.float32(1)) == noise.alpha(np.int64(1)) == noise.alpha(1.0)


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
def test_differentiable_both_ways(noise: NoiseSchedule) -> None:
    span = noise.t_max - noise.t_min
    t = (noise.t_min + span * torch.tensor([0.1234, 0.4567, 0.7771], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: (noise.alpha(t), noise.sigma(t)), (t,), eps=1e-7 * span, atol=1e-6)
    lam = noise.at(t=t.detach()).lam.requires_grad_()
    assert torch.autograd.gradcheck(lambda lam: noise.at(lam=lam).t, (lam,), eps=1e-7, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
def test_tensors_are_not_read_back(noise: NoiseSchedule) -> None:
    p = noise.at(lam=torch.zeros(3, device="meta"))  # a tensor without values: reading one raises
    assert noise.at(t=p.t).alpha.shape == (3,)


def test_beyond_a_table() -> None:
    noise = TABLES["scaled_linear"]
    assert noise.at(lam=-50.0).t == 999
    assert noise.at(lam=50.0).t == 0
    assert noise.at(lam=torch.tensor([-50.0, 50.0])).t.tolist() == [999, 0]
    with pytest.raises(ValueError, match=r"\[0, 999\], got 1000"):
        noise.alpha(1000.0)


def test_into_pure_noise() -> None:
    noise = TABLES["zero_snr"]
    assert noise.noisiest.alpha == 0
    assert noise.noisiest.sigma == 1
    assert noise.noisiest.lam == -math.inf
    assert noise.at(t=998.5).alpha / noise.at(t=998.5).sigma == pytest.approx(noise.alpha(998) / noise.sigma(998) / 2)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("rescale", [False, True])
def test_tables_are_diffusers(name: str, rescale: bool) -> None:
    ends = {"beta_start": 0.00085, "beta_end": 0.012}
    theirs = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=rescale, **ends)
    noise, prediction = from_diffusers_config(theirs.config)
    torch.testing.assert_close(torch.tensor(noise.alphas_cumprod).float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert prediction == "epsilon"
    assert (noise.alphas_cumprod[-1] == 0) == rescale


def test_zero_terminal_snr_keeps_the_first_level() -> None:
    noise = TABLES["scaled_linear"]
    rescaled = noise.zero_terminal_snr()
    assert rescaled.alphas_cumprod[0] == pytest.approx(noise.alphas_cumprod[0], rel=1e-12)
    for flow in CONTINUOUS.values():
        with pytest.raises(ValueError, match="only a table can be rescaled"):
            flow.zero_terminal_snr()


def test_flow_shift_at_a_resolution() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    noise, prediction = from_diffusers_config(theirs.config)
    assert prediction == "flow_prediction"
    assert noise.dynamic is not None
    mu = 0.5 + (1.15 - 0.5) * (1000 - 256) / (4096 - 256)
    shifted = noise.at_resolution(1000)
    assert shifted.shift == pytest.approx(math.exp(mu))
    u = [1.0, 0.75, 0.5, 0.25]
    theirs.set_timesteps(sigmas=u, mu=mu)
    s = schedulers.get("euler", noise=shifted, prediction=prediction)
    s.set_timesteps(sigmas=u)
    torch.testing.assert_close(s.timesteps, theirs.timesteps)
    linear = NoiseSchedule.flow(dynamic={"time_shift_type": "linear"}).with_mu(2.0)
    assert linear.shift == 2.0
    with pytest.raises(ValueError, match="mu shifts a flow"):
        NoiseSchedule.edm().with_mu(1.0)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=["static", "dynamic"])
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_flow_ends_at_its_terminal_sigma(config: dict[str, Any], n: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, **config)
    noise, prediction = from_diffusers_config(theirs.config)
    assert noise == NoiseSchedule.from_recipe(json.loads(json.dumps(noise.recipe)))
    mu = {"mu": 0.8} if noise.dynamic else {}
    s = schedulers.get("euler", noise=noise, prediction=prediction, grid="trailing")
    s.set_timesteps(n, **mu)
    if n > 1:  # theirs divides 0 by 0
        theirs.set_timesteps(sigmas=[1 - k / n for k in range(n)], **mu)
        torch.testing.assert_close(s.sigmas, theirs.sigmas)
        written = [0.9 - 0.8 * k / n for k in range(n)]  # a list that somebody chose
        s.set_timesteps(sigmas=written, **mu)
        theirs.set_timesteps(sigmas=written, **mu)
        torch.testing.assert_close(s.sigmas, theirs.sigmas)
    for grid in schedulers.grid_names() if n == 7 else ():
        each = schedulers.get("euler", noise=noise, prediction=prediction, grid=grid)
        each.set_timesteps(n, **mu)
        assert float(each.sigmas[-2]) == pytest.approx(0.02)


def test_flow_shift_of_flux_2_depends_on_the_steps() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    by_resolution = NoiseSchedule.flow(dynamic={"mu": "flux2"})
    assert from_diffusers_config(schedulers.get("euler", noise=by_resolution, prediction="flow_prediction").config) == (
        by_resolution,
        "flow_prediction",
    )
    for tokens in (256, 4096, 4300, 4301, 9000):
        noise = by_resolution.at_resolution(tokens)
        assert NoiseSchedule.from_recipe(noise.recipe) == noise
        s = schedulers.get("euler", noise=noise, prediction="flow_prediction", grid="trailing")
        for n in (4, 28, 50, 200):
            theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
            theirs.set_timesteps(sigmas=[1 - k / n for k in range(n)], mu=compute_empirical_mu(tokens, n))
            s.set_timesteps(n)
            torch.testing.assert_close(s.sigmas, theirs.sigmas)


@pytest.mark.parametrize(("scale", "rescale"), [(3.0, True), (1.0, True), (3.0, False)])
def test_ratios_of_cogvideox(scale: float, rescale: bool) -> None:
    theirs = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=scale, rescale_betas_zero_snr=rescale)
    noise, _ = from_diffusers_config({**theirs.config, "prediction_type": "v_prediction"})
    assert noise.alphas_cumprod == pytest.approx(theirs.alphas_cumprod.tolist(), rel=1e-4, abs=1e-9)
    assert NoiseSchedule.from_recipe(json.loads(json.dumps(noise.recipe))).alphas_cumprod == noise.alphas_cumprod


@pytest.mark.parametrize("noise", ALL.values(), ids=ALL)
def test_recipes_make_the_same_again(noise: NoiseSchedule) -> None:
    again = NoiseSchedule.from_recipe(json.loads(json.dumps(noise.recipe)))
    assert again == noise
    assert again.at(t=noise.t_max) == noise.at(t=noise.t_max)
    assert again.alphas_cumprod == noise.alphas_cumprod


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NoiseSchedule.from_betas([]), "betas must lie"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.0, 0.1]), r"\(1, 1.0\)"),
        (lambda: NoiseSchedule.from_betas([float("nan")]), "nan"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.95]), "fall strictly"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.0]), "fall strictly"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.0, 0.0]), "fall strictly"),
        (lambda: NoiseSchedule.flow(0.0), "shift must be positive, got 0.0"),
        (lambda: NoiseSchedule.flow(terminal=1.0), "terminal must lie between 0 and 1, got 1.0"),
        (lambda: NoiseSchedule.flow(dynamic={"mu": "cubic"}), "'linear' or 'flux2', got 'cubic'"),
        (lambda: NoiseSchedule.flow().with_snr_divided(3.0), "only the ratios of a table are divided"),
        (lambda: NoiseSchedule.edm(1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: NoiseSchedule.linear(10), r"β must stay inside \(0, 1\); T = 10"),
        (lambda: NoiseSchedule.named("quadratic"), "unknown noise schedule 'quadratic'; there are linear"),
        (lambda: NoiseSchedule.from_betas([0.5]).zero_terminal_snr(), "one level"),
    ],
)
def test_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# scheduler_config.json

BETA_CLASSES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
]


@pytest.mark.parametrize("name", BETA_CLASSES)
def test_configurations_of_every_table_class(name: str) -> None:
    theirs = getattr(diffusers, name)(prediction_type="v_prediction")
    noise, prediction = from_diffusers_config({"_class_name": name, **theirs.config})
    torch.testing.assert_close(torch.tensor(noise.alphas_cumprod).float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert prediction == "v_prediction"


def test_configurations_with_betas_of_their_own() -> None:
    noise, _ = from_diffusers_config(diffusers.DDIMScheduler(trained_betas=[0.1, 0.2, 0.3]).config)
    assert noise.alphas_cumprod == pytest.approx((0.9, 0.72, 0.504))


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_configurations_of_edm(name: str) -> None:
    config = {"_class_name": name, **getattr(diffusers, name)(sigma_min=0.01, sigma_max=70.0, sigma_data=0.7).config}
    noise, prediction = from_diffusers_config(config)
    assert (noise, prediction) == (NoiseSchedule.edm(0.01, 70.0, 0.7), "edm")
    assert from_diffusers_config({**config, "prediction_type": "v_prediction"})[1] == "edm_v"


def test_configurations_of_flows() -> None:
    assert from_diffusers_config({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}) == (
        NoiseSchedule.flow(3.0),
        "flow_prediction",
    )
    unipc = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    assert from_diffusers_config(unipc.config) == (NoiseSchedule.flow(2.0), "flow_prediction")


def test_stable_video() -> None:
    config = {
        "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
        "sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous",
    }  # fmt: skip
    assert from_diffusers_config(config) == (NoiseSchedule.edm(0.002, 700.0, 1.0), "edm_v")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "beta_schedule None is not supported"),
        ({"_class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler: beta_schedule None is not supported"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01}, "beta_schedule None is not supported"),
        ({"beta_schedule": "quadratic"}, "'quadratic' is not supported. Supported are linear"),
        ({"beta_schedule": "linear", "prediction_type": "trigflow"}, "prediction_type 'trigflow'"),
        ({"beta_schedule": "linear", "num_train_timesteps": 10**9}, "num_train_timesteps must be .* at most 100000"),
        ({"beta_schedule": "linear", "num_train_timesteps": True}, "got True"),
        ({"beta_schedule": "linear", "beta_end": "0.02"}, "beta_end must be .*'0.02'"),
        ({"beta_schedule": "linear", "beta_end": float("nan")}, "beta_end"),
        ({"beta_schedule": "scaled_linear", "snr_shift_scale": -3.0}, "snr_shift_scale must be a number above 0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 1.5}, "shift_terminal must be .* most 1"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas is not supported"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "'sample with continuous times'"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_diffusers_config(config)
