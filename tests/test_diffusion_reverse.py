"""The reverse process on Gaussian data, with known mean, variance and samples, and against diffusers."""

import math

import pytest
import torch
from gaussian import exact, marginal, reverse_variance

from diffgen.diffusion import GaussianDiffusion
from schedulers import NoiseSchedule

LINEAR = NoiseSchedule.linear(1000)
PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow_prediction"]
VARIANCES = ["fixed_small", "fixed_large", "learned_range"]
M, S = 0.3, 0.5  # the data: N(0.3, 0.5²)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def column(value: float, n: int) -> torch.Tensor:
    return torch.full((n, 1), value, dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", [LINEAR, NoiseSchedule.cosine(100), NoiseSchedule.linear(25)], ids=repr)
def test_the_exact_denoiser_gives_the_exact_reverse_step(noise: NoiseSchedule, prediction: str):
    """E[x_{t-1} | x_t] and Var(x_{t-1} | x_t) of jointly Gaussian variables, at every t."""
    d = GaussianDiffusion(noise, prediction, "learned_range")
    t, x = torch.arange(d.T), double(d.T, 1)
    mean, variance = d.p_mean_variance(exact(d, M, S)(x, t), x, t)
    before = d.alpha_bar_before * S**2 + 1 - d.alpha_bar_before
    gain = (1 - d.beta).sqrt() * before / marginal(d, S)
    expected = d.alpha_bar_before.sqrt() * M + gain * (x.flatten() - d.alpha * M)
    torch.testing.assert_close(mean.flatten(), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(variance.flatten(), reverse_variance(d, S), rtol=1e-9, atol=0)


def test_variances_are_the_paper_s():
    """β̃_t and β_t of DDPM section 3.2; the learned one interpolates between them, with β̃_0 := β̃_1."""
    x, t = double(1000, 2, 3, 3), torch.arange(1000)
    small, large, learned = (GaussianDiffusion(LINEAR, variance=v) for v in VARIANCES)
    mean, got_small = small.p_mean_variance(x, x, t)
    assert got_small.shape == mean.shape == x.shape
    got_large = large.p_mean_variance(x, x, t)[1]
    beta, bar = small.beta, small.alpha_bar
    for i in (0, 1, 500, 999):
        before = bar[i - 1] if i else torch.tensor(1.0, dtype=torch.float64)
        assert got_small[i, 1, 2, 2].item() == pytest.approx((beta[i] * (1 - before) / (1 - bar[i])).item(), rel=1e-12)
        assert got_large[i, 1, 2, 2].item() == pytest.approx(beta[i].item(), rel=1e-12)

    def of(v: float) -> torch.Tensor:
        got_mean, variance = learned.p_mean_variance(torch.cat([x, torch.full_like(x, v)], 1), x, t)
        torch.testing.assert_close(got_mean, mean, rtol=0, atol=0)
        return variance

    torch.testing.assert_close(of(1.0), got_large, rtol=1e-12, atol=0)
    torch.testing.assert_close(of(-1.0)[1:], got_small[1:], rtol=1e-12, atol=0)
    torch.testing.assert_close(of(-1.0)[0], got_small[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(of(0.5), of(1.0) ** 0.75 * of(-1.0) ** 0.25, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("T", [30, 1000])
def test_samples_have_the_exact_moments(T: int, prediction: str):
    """The whole reverse process, as an affine map of mean and variance, from N(0, 1) to the end.

    With the exact step of N(m, s²), only the start differs (N(0, 1) for q(x_T)), and the chain passes a share
    α_T·s²/V_T of it on; the last step adds no noise, which leaves Var(x_0 | x_1) out.
    """
    d = GaussianDiffusion(NoiseSchedule.linear(T), prediction, "learned_range")
    model, mean, variance = exact(d, M, S), column(0.0, 1), column(1.0, 1)
    for step in reversed(range(T)):
        t = torch.tensor([step, step])
        at = torch.cat([column(0.0, 1), column(1.0, 1)])
        (shift, end), added = d.p_mean_variance(model(at, t), at, t)
        mean, variance = shift + (end - shift) * mean, (end - shift) ** 2 * variance + added[0] * (step > 0)
    kept = d.alpha[-1] * S**2 / marginal(d, S)[-1]
    assert mean.item() == pytest.approx((M - kept * d.alpha[-1] * M).item(), rel=1e-7)
    expected = S**2 - reverse_variance(d, S)[0] + kept**2 * (1 - marginal(d, S)[-1])
    assert variance.item() == pytest.approx(expected.item(), rel=1e-7)


def test_sample_draws_from_that_distribution():
    d = GaussianDiffusion(NoiseSchedule.linear(50), variance="learned_range")
    n = 40_000
    x = d.sample(exact(d, M, S), (n, 1), generator())
    assert x.dtype == torch.float32
    assert not x.requires_grad
    deviation = math.sqrt(S**2 - reverse_variance(d, S)[0].item())
    assert x.mean().item() == pytest.approx(M, abs=4 * deviation / math.sqrt(n))
    assert x.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * n))


def test_sample_is_p_sample_from_t_minus_1_to_0():
    d = GaussianDiffusion(NoiseSchedule.linear(30), "v_prediction", "fixed_large")
    model, steps = exact(d, M, S), []
    actual = d.sample(model, (3, 1, 2, 2), generator(), progress=lambda t, x: steps.append((t, x)))
    g = generator()
    x = torch.randn(3, 1, 2, 2, generator=g)
    for i, step in enumerate(reversed(range(30))):
        x = d.p_sample(model, x, torch.full((3,), step), g)
        assert steps[i][0] == step
        assert torch.equal(steps[i][1], x)
    assert torch.equal(actual, x)


def test_the_last_step_adds_no_noise_and_the_others_do():
    d = GaussianDiffusion(LINEAR, variance="fixed_large")
    x, t = double(3, 1, 2, 2), torch.tensor([0, 1, 999])
    model = exact(d, M, S)
    one, other = d.p_sample(model, x, t, generator(1)), d.p_sample(model, x, t, generator(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[0], d.p_mean_variance(model(x, t), x, t)[0][0])
    assert (one[1:] != other[1:]).all()


def test_an_image_does_not_depend_on_its_batch():
    d = GaussianDiffusion(NoiseSchedule.linear(30))
    model = exact(d, M, S)
    batch = d.sample(model, (3, 1, 2, 2), [generator(s) for s in (7, 8, 9)])
    assert torch.equal(d.sample(model, (1, 1, 2, 2), [generator(8)])[0], batch[1])
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        d.sample(model, (3, 1, 2, 2), [generator(), generator()])


def test_clipping_keeps_x0_in_the_range():
    """At the end of a cosine schedule x̂0 explodes; clipped, the mean is that of the posterior at the clipped x̂0."""
    d = GaussianDiffusion(NoiseSchedule.cosine(1000))
    x, t = double(4, 1, 2, 2), torch.full((4,), 999)
    output = torch.zeros_like(x)
    assert d.predict_x0(output, x, t).abs().max() > 1000
    mean, _ = d.p_mean_variance(output, x, t, clip=(-1.0, 1.0))
    torch.testing.assert_close(mean, d.q_posterior(x.sign(), x, t)[0])


def test_zero_terminal_snr_starts_from_pure_noise():
    """v from α = 0: x̂0 = −v; there the exact denoiser knows only the mean of the data."""
    d = GaussianDiffusion(NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0]), "v_prediction", "fixed_large")
    x, t = double(1, 1), torch.tensor([2])
    mean, variance = d.p_mean_variance(exact(d, M, S)(x, t), x, t)
    assert mean.item() == pytest.approx(math.sqrt(0.5) * M, rel=1e-12)
    assert variance.item() == 1.0


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_as_diffusers_does(prediction: str, variance: str, clip: tuple[float, float] | None):
    """DDPMScheduler.step, element by element, in float32 with its own table.

    That table is the reason for the wider tolerance at small t: β_t as 1 − ᾱ_t/ᾱ_{t−1} of float32 numbers near 1 has
    three digits left at t = 2. The next test gives it a float64 table.
    """
    d, reference = pair(prediction, variance, clip)
    x = torch.randn(2, 3, 4, 4, generator=generator())
    output = torch.randn(2, 3 * (1 + (variance == "learned_range")), 4, 4, generator=generator(1)).clamp(-1, 1)
    for step in (0, 2, 10, 50, 100, 500, 998, 999):
        t = torch.full((2,), step)
        want = reference.step(output, step, x, generator=generator(2)).prev_sample
        actual = d.p_sample(lambda x, t: output, x, t, generator(2), clip=clip)
        torch.testing.assert_close(actual, want, rtol=0, atol=1e-5 if step >= 50 else 5e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_mean_and_variance_are_those_of_diffusers_with_a_float64_table(prediction: str, variance: str):
    """Without the variance at t = 0, which is wrong in diffusers: a clamped 1e-20, and learned_range interpolates
    over 37 nats from it. Samples do not show it, because that step adds no noise; a likelihood would."""
    d, reference = pair(prediction, variance, None)
    reference.alphas_cumprod, reference.one = d.alpha_bar, torch.tensor(1.0, dtype=torch.float64)
    x, output = double(1, 2, 3, 3), double(1, 2 * (1 + (variance == "learned_range")), 3, 3, seed=1)
    noise = double(1, 2, 3, 3, seed=2)
    for step in [0, 1, 2, 3, *range(10, 1000, 23), 999]:
        mean, actual = d.p_mean_variance(output, x, torch.tensor([step]))
        want = reference.step(output, step, x, generator=generator(2)).prev_sample
        if step > 0:
            want = want - actual.sqrt() * noise
            torch.testing.assert_close(actual, its_variance(reference, step, output, x), rtol=1e-9, atol=0)
        torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-9)


def test_a_whole_run_as_diffusers_does():
    d, reference = pair("epsilon", "fixed_small", (-1.0, 1.0), T=40)
    model = exact(d, M, S)
    g = generator()
    x = torch.randn(2, 1, 4, 4, generator=g)
    for step in reference.timesteps.tolist():
        x = reference.step(model(x, torch.full((2,), step)), step, x, generator=g).prev_sample
    torch.testing.assert_close(d.sample(model, (2, 1, 4, 4), generator(), clip=(-1.0, 1.0)), x, rtol=0, atol=1e-5)


def pair(prediction: str, variance: str, clip: tuple[float, float] | None, T: int = 1000):
    """Our process and diffusers' scheduler of the same settings."""
    diffusers = pytest.importorskip("diffusers")
    noise = NoiseSchedule.linear(T)
    reference = diffusers.DDPMScheduler(
        num_train_timesteps=T,
        trained_betas=list(noise.betas),
        prediction_type=prediction,
        variance_type=variance,
        clip_sample=clip is not None,
    )
    return GaussianDiffusion(noise, prediction, variance), reference


def its_variance(reference, step: int, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The variance of diffusers' step (it returns the logarithm of a learned one)."""
    if reference.variance_type == "learned_range":
        return reference._get_variance(step, predicted_variance=output[:, x.shape[1] :]).exp()
    return reference._get_variance(step).expand_as(x)


def test_what_does_not_fit_is_refused():
    x, t = torch.zeros(2, 1, 4, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="unknown variance 'learned'"):
        GaussianDiffusion(LINEAR, variance="learned")
    with pytest.raises(ValueError, match=r"needs \[2, 2, 4, 4\]"):
        GaussianDiffusion(LINEAR, variance="learned_range").p_mean_variance(x, x, t)
    with pytest.raises(ValueError, match=r"needs \[2, 1, 4, 4\]"):
        GaussianDiffusion(LINEAR).p_mean_variance(torch.cat([x, x], 1), x, t)
