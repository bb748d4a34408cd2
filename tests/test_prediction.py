"""Predictions: every target gives back x0 and ε; EDM and the limits of x0 are diffusers'; errors."""

from __future__ import annotations

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import schedulers
from schedulers import NoiseSchedule
from schedulers.prediction import PREDICTIONS, Denoised, bind, check, clip, input_scale, target, threshold

SCHEDULES = {
    "vp": NoiseSchedule.scaled_linear(),
    "zero_snr": NoiseSchedule.cosine().zero_terminal_snr(),
    "flow": NoiseSchedule.flow(3.0),
    "edm": NoiseSchedule.edm(sigma_data=0.7),
}


def works(prediction: str, noise: NoiseSchedule) -> bool:
    try:
        check(prediction, noise)
    except ValueError:
        return False
    return True


COMBINATIONS = [(p, name) for p in PREDICTIONS for name in SCHEDULES if works(p, SCHEDULES[name])]


def test_combinations_of_options() -> None:
    refused = {(p, name) for p in PREDICTIONS for name in SCHEDULES} - set(COMBINATIONS)
    assert refused == {
        ("epsilon", "zero_snr"),
        ("epsilon", "flow"),
        *((edm, name) for edm in ("edm", "edm_v") for name in ("vp", "zero_snr", "flow")),
    }
    with pytest.raises(ValueError, match=r"epsilon prediction cannot work with .*\(α = 0\)"):
        schedulers.get("euler", noise="flow")
    with pytest.raises(ValueError, match=r"edm is the preconditioning of an edm schedule; this is NoiseSchedule\.flow"):
        schedulers.get("euler", noise="flow", prediction="edm")
    with pytest.raises(ValueError, match="unknown prediction 'velocity'; there are epsilon"):
        schedulers.get("euler", prediction="velocity")


@pytest.mark.parametrize(("prediction", "schedule"), COMBINATIONS)
@given(u=st.floats(0.01, 1), x0=st.floats(-3, 3), eps=st.floats(-3, 3))
def test_both_come_back_from_the_target(prediction: str, schedule: str, u: float, x0: float, eps: float) -> None:
    noise = SCHEDULES[schedule]
    p = noise.at(t=noise.t_min + u * (noise.t_max - noise.t_min))
    a, b = bind(prediction, noise)(p)
    d = Denoised(p.alpha * x0 + p.sigma * eps, a * x0 + b * eps, p, bind(prediction, noise))
    lost = 1e-13 * max(p.rho if p.alpha else 1, 1 / p.rho if p.alpha else 1)  # what the state has rounded away
    assert d.x0 == pytest.approx(x0, abs=1e-12 + lost)
    assert d.eps == pytest.approx(eps, abs=1e-12 + lost)
    if prediction not in ("edm", "edm_v"):
        assert a * x0 + b * eps == target(prediction, p, x0, eps)


def test_tensors_and_numbers_agree() -> None:
    p = SCHEDULES["vp"].at(t=500.0)
    x, output = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for prediction in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        d = Denoised(x, output, p, prediction)
        torch.testing.assert_close(p.alpha * d.x0 + p.sigma * d.eps, x)
        one = Denoised(float(x[0, 0, 0]), float(output[0, 0, 0]), p, prediction)
        assert float(d.x0[0, 0, 0]) == pytest.approx(one.x0, abs=1e-14)
        assert float(d.eps[0, 0, 0]) == pytest.approx(one.eps, abs=1e-14)


@pytest.mark.parametrize(("prediction", "theirs"), [("edm", "epsilon"), ("edm_v", "v_prediction")])
def test_edm_is_diffusers(prediction: str, theirs: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7, prediction_type=theirs)
    noise = SCHEDULES["edm"]
    x, output = torch.randn(2, 1, 4, 4)
    for sigma in (80.0, 1.0, 0.01):
        p = noise.at(lam=-torch.tensor(sigma).log().item())
        d = Denoised(x, output, p, bind(prediction, noise))
        torch.testing.assert_close(d.x0, scheduler.precondition_outputs(x, output, sigma), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x * input_scale(prediction, noise, p), scheduler.precondition_inputs(x, sigma))
        assert p.t == pytest.approx(float(scheduler.precondition_noise(sigma)))
    assert input_scale("epsilon", noise, p) == 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_eps_follows_a_limited_x0(prediction: str) -> None:
    p = SCHEDULES["vp"].at(t=700.0)
    x, output = torch.randn(2, 3, 5, 5) * 4
    d = Denoised(x, output, p, prediction, lambda x0: clip(x0, 1.0))
    assert d.x0.abs().max() == 1
    torch.testing.assert_close(p.alpha * d.x0 + p.sigma * d.eps, x)


def test_limits_are_diffusers() -> None:
    x0 = torch.randn(3, 3, 8, 8) * torch.tensor([0.1, 1.0, 9.0]).reshape(3, 1, 1, 1)
    theirs = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    torch.testing.assert_close(threshold(x0, 0.9, 2.0), theirs._threshold_sample(x0))
    ddim = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=True, clip_sample_range=0.8)
    ddim.set_timesteps(5)
    x, output = torch.randn(2, 1, 3, 4, 4)
    ours = schedulers.get("euler", noise="linear", grid=[float(t) for t in ddim.timesteps], clip_sample=0.8)
    ours.set_timesteps(5)
    for t in ddim.timesteps[:3]:
        expected = ddim.step(output, t, x, use_clipped_model_output=True, return_dict=False)[0]
        x = ours.step(output, t, x, return_dict=False)[0]
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_data_of_one_number() -> None:
    """A batch of numbers [B]: each number is an image for limits and step sizes."""
    x = torch.linspace(-2, 2, 5)
    for s in (schedulers.get("euler", thresholding=True), schedulers.get("dpm_adaptive")):
        result = s.sample(lambda x, t: x * 0.5, x, 5)
        assert torch.equal(result, s.sample(lambda x, t: x * 0.5, x[:, None], 5)[:, 0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip_sample": -1.0}, "clip_sample must be above 0, got -1"),
        ({"clip_sample": True, "thresholding": True}, "exclude each other"),
        ({"thresholding": 1.5}, r"thresholding must lie in \(0, 1\]"),
        ({"thresholding": True, "sample_max_value": 0.5}, "from 1 up, got 0.995 and 0.5"),
    ],
)
def test_limits_that_cannot_be(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        schedulers.get("euler", **options)  # type: ignore[arg-type]


def test_a_learned_variance_takes_no_part() -> None:
    p = SCHEDULES["vp"].at(t=500.0)
    x, output = torch.randn(1, 3, 4, 4), torch.randn(1, 6, 4, 4)
    d = Denoised(x, output, p, "epsilon")
    torch.testing.assert_close(d.x0, Denoised(x, output[:, :3], p, "epsilon").x0)
    assert d.output is output
