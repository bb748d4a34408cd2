"""The forward process and the loss against their closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgen.diffusion import GaussianDiffusion
from schedulers import NoiseSchedule

LINEAR = NoiseSchedule.linear(1000)


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*t: int) -> torch.Tensor:
    return torch.tensor(t)


def test_the_table_is_the_paper_s():
    """DDPM section 4: β from 1e-4 to 0.02 in 1000 steps leaves next to no signal (their L_T is about 1e-5 bits/dim)."""
    d = GaussianDiffusion(LINEAR)
    assert d.beta[0].item() == pytest.approx(1e-4, rel=1e-12)
    assert d.beta[-1].item() == pytest.approx(0.02, rel=1e-9)
    assert d.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(num_train_timesteps=1000)
    torch.testing.assert_close(d.alpha_bar.float(), reference.alphas_cumprod, rtol=1e-4, atol=0)


def test_steps_compose_to_q_sample():
    """Mean and variance of q(x_t | x_0) follow from t + 1 single steps: propagate them exactly, compare with eq. 4."""
    d = GaussianDiffusion(NoiseSchedule.linear(50))
    x = torch.full((1, 1), 1.7, dtype=torch.float64)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    mean, variance = x, zero
    for t in range(50):
        factor = d.q_step(one, times(t), zero)  # q_step is affine: factor·x + deviation·noise
        deviation = d.q_step(zero, times(t), one)
        mean, variance = factor * mean, factor**2 * variance + deviation**2
        torch.testing.assert_close(mean, d.q_sample(x, times(t), zero), rtol=1e-12, atol=0)
        torch.testing.assert_close(variance.sqrt(), d.q_sample(zero, times(t), one), rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 999), st.floats(-3, 3), st.floats(-3, 3))
def test_posterior_is_bayes_rule(t: int, x0: float, x_t: float):
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0): the product of two Gaussians, by precision weights."""
    d = GaussianDiffusion(LINEAR)
    beta, before = d.beta[t].item(), d.alpha_bar[t - 1].item()
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) * x_t / beta + math.sqrt(before) * x0 / (1 - before)) / precision
    as_tensor = [torch.tensor([[v]], dtype=torch.float64) for v in (x0, x_t)]
    got_mean, got_variance = d.q_posterior(*as_tensor, times(t))
    assert got_mean.item() == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert got_variance.item() == pytest.approx(1 / precision, rel=1e-9)


def test_posterior_at_the_first_step_is_the_picture():
    d = GaussianDiffusion(LINEAR)
    x0, x_t = double(3, 1, 4, 4), double(3, 1, 4, 4, seed=1)
    mean, variance = d.q_posterior(x0, x_t, times(0, 0, 0))
    torch.testing.assert_close(mean, x0, rtol=0, atol=1e-12)
    assert variance.abs().max() == 0


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_loss_is_zero_for_an_oracle_and_one_for_silence(prediction: str):
    """A network that knows x0 and ε has loss 0; one with the output 0 has E‖target‖² = 1 for unit-variance data."""
    d = GaussianDiffusion(LINEAR, prediction=prediction)
    x0, noise = double(64, 3, 16, 16), double(64, 3, 16, 16, seed=1)
    t = torch.arange(64) * 15
    alpha, sigma = d.at("alpha", t, x0), d.at("sigma", t, x0)
    target = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction]
    loss = d.loss(lambda x, t: target, x0, t, noise)
    assert loss.shape == (64,)
    assert loss.max() < 1e-24
    silent = d.loss(lambda x, t: torch.zeros_like(x), x0, t, noise)
    assert silent.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / x0.numel()))


def test_loss_floor_of_gaussian_data():
    """For data N(0, s²) the best ε̂ is σ_t·x_t/(α²s² + σ²), with the loss α²s²/(α²s² + σ²); within 4 deviations."""
    d, s, t = GaussianDiffusion(LINEAR), 0.5, 300
    n = 400_000
    x0, noise = s * double(n, 1), double(n, 1, seed=1)
    alpha2, sigma2 = d.alpha_bar[t].item(), 1 - d.alpha_bar[t].item()
    total = alpha2 * s * s + sigma2
    loss = d.loss(lambda x, _: math.sqrt(sigma2) * x / total, x0, torch.full((n,), t), noise)
    floor = alpha2 * s * s / total
    assert loss.mean().item() == pytest.approx(floor, abs=4 * floor * math.sqrt(2 / n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pictures_get_their_noise(dtype: torch.dtype):
    """ᾱ_0 = 0.9999 is 1 in bfloat16; the tables stay float32, and only the result is rounded to the picture's dtype."""
    d = GaussianDiffusion(LINEAR)
    x0, noise, t = double(2, 1, 4, 4).to(dtype), double(2, 1, 4, 4, seed=1).to(dtype), times(0, 5)
    actual = d.q_sample(torch.zeros_like(x0), t, noise)
    assert actual.dtype == dtype
    assert torch.equal(actual, d.q_sample(torch.zeros_like(x0).float(), t, noise.float()).to(dtype))
    assert (actual != 0).all()
    assert d.loss(lambda x, t: x, x0, t, noise).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    d = GaussianDiffusion(LINEAR)
    x = torch.zeros(2, 1, 4, 4)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=r"0 … 999"):
            d.q_sample(x, times(0, t), x)
    with pytest.raises(ValueError, match="floating point"):
        d.q_sample(x.byte(), times(0, 1), x)
    with pytest.raises(ValueError, match=r"LongTensor \[2\]"):
        d.q_sample(x, torch.zeros(2), x)
    with pytest.raises(ValueError, match=r"LongTensor \[2\]"):
        d.q_sample(x, times(1), x)
    with pytest.raises(ValueError, match="shape"):
        d.loss(lambda x, t: x[:, :0], x, times(1, 2), x)
    with pytest.raises(ValueError, match="table"):
        GaussianDiffusion(NoiseSchedule.edm())
    with pytest.raises(ValueError, match="epsilon prediction cannot work"):
        GaussianDiffusion(NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0]))
    with pytest.raises(ValueError, match="inside"):
        NoiseSchedule.linear(10)
