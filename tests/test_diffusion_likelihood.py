"""Bits per dimension on Gaussian data with a closed-form density: every term of the bound, the decoder, the ODE."""

import math

import pytest
import torch
from gaussian import exact, marginal
from numpy.polynomial.hermite_e import hermegauss

from diffgen.diffusion import GaussianDiffusion
from diffgen.diffusion.likelihood import bits_per_dim_ode, bound_term, decoder_nll, ode_log_density, variational_bound
from schedulers import NoiseSchedule

M, S = 0.1, 0.3
FINE = 2**14  # so many levels that the mass of a bin is its width times the density


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def normal_bits(x: torch.Tensor, mean: float, deviation: float, levels: int) -> torch.Tensor:
    """−log2 of the mass of N(mean, deviation²) on the bin around x, in the middle of the range."""
    nats = (
        0.5 * ((x - mean) / deviation) ** 2 + math.log(deviation * math.sqrt(2 * math.pi)) - math.log(2 / (levels - 1))
    )
    return nats / math.log(2)


def mass(a: float, b: float) -> float:
    """Φ(b) − Φ(a), from the tail that keeps its digits."""
    if a > 0:
        a, b = -b, -a
    return 0.5 * (math.erfc(-b / math.sqrt(2)) - math.erfc(-a / math.sqrt(2)))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_decoder_is_the_mass_of_a_bin(levels: int):
    """DDPM eq. 13 by erfc, for means inside and outside the range; the masses of all bins sum to 1."""
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for mean in (-1.7, -1.0, -0.31, 0.0, 0.5, 1.02):
        for deviation in (0.02, 0.1, 1.0):
            parameters = torch.tensor([mean, 2 * math.log(deviation)], dtype=torch.float64)
            nll = decoder_nll(grid, *parameters, levels)
            assert nll.neg().exp().sum().item() == pytest.approx(1, rel=1e-9)
            for i in {0, 1, levels // 2, levels - 2, levels - 1}:
                a = -math.inf if i == 0 else (grid[i].item() - 1 / (levels - 1) - mean) / deviation
                b = math.inf if i == levels - 1 else (grid[i].item() + 1 / (levels - 1) - mean) / deviation
                expected = mass(a, b)
                if expected > 1e-290:  # beyond that the reference has no digits, and ours is still finite
                    assert nll[i].item() == pytest.approx(-math.log(expected), rel=1e-9, abs=1e-12)
                assert nll[i].isfinite()


def test_the_decoder_has_gradients_far_outside():
    """A first network is wrong by many deviations; its loss still says in which direction, in float32 too."""
    x0 = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    mean = torch.tensor([3.0, -4.0, 0.0, 4.0, -3.0], requires_grad=True)
    log_variance = torch.full((5,), 2 * math.log(0.007), requires_grad=True)
    decoder_nll(x0, mean, log_variance, 256).sum().backward()
    assert mean.grad.isfinite().all()
    assert log_variance.grad.isfinite().all()
    assert mean.grad.sign().tolist() == [1, -1, 0, 1, -1]


def expectation(d: GaussianDiffusion, model, x0: float, levels: int) -> float:
    """E over ε of Σ_t L_t at one x0, by Gauss-Hermite quadrature: exact for the terms that are quadratic in ε."""
    nodes, weights = (torch.from_numpy(v) for v in hermegauss(31))
    noise, x = nodes[:, None], torch.full((31, 1), x0, dtype=torch.float64)
    total = 0.0
    for step in range(d.T):
        t = torch.full((31,), step)
        x_t = d.q_sample(x, t, noise)
        term = bound_term(d, model(x_t, t), x, x_t, t, levels)
        total += (weights @ term).item() / math.sqrt(2 * math.pi)
    return total


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("noise", [NoiseSchedule.linear(40), NoiseSchedule.from_betas([0.3])], ids=repr)
def test_the_bound_is_exact_for_standard_normal_data(noise: NoiseSchedule, variance: str, prediction: str):
    """For N(0, 1) the reverse process with variance β_t is q backwards (DDPM section 3.2): the bound is the likelihood
    of every x0, and L_T = ½(ᾱ_T·(x0² − 1) − ln(1 − ᾱ_T)) is a part of it, at any T."""
    d = GaussianDiffusion(noise, prediction, variance, levels=FINE)
    for x0 in (-0.8, 0.0, 0.35):
        bar = d.alpha_bar[-1].item()
        prior = 0.5 * (bar * x0**2 - bar - math.log(1 - bar)) / math.log(2)
        x = torch.full((1, 1), x0, dtype=torch.float64)
        assert variational_bound(d, exact(d, 0, 1), x)[-1].item() == pytest.approx(prior, rel=1e-9)
        actual = expectation(d, exact(d, 0, 1), x0, FINE) + prior
        assert actual == pytest.approx(normal_bits(x, 0, 1, FINE).item(), abs=2e-6)


def test_the_bound_is_exact_with_the_learned_variance():
    """For N(m, s²), with E over x0: the entropy, and KL(q(x_T) ‖ N(0, 1)) for starting from the wrong Gaussian.

    The bound is quadratic in x0, so its expectation is that over m and m ± √3·s with the weights ⅔ and ⅙.
    """
    d = GaussianDiffusion(NoiseSchedule.linear(40), "epsilon", "learned_range")
    model, total = exact(d, M, S), 0.0
    for x0, weight in ((M, 2 / 3), (M + math.sqrt(3) * S, 1 / 6), (M - math.sqrt(3) * S, 1 / 6)):
        prior = variational_bound(d, model, torch.full((1, 1), x0, dtype=torch.float64))[-1].item()
        total += weight * (expectation(d, model, x0, FINE) + prior)
    entropy = 0.5 * math.log(2 * math.pi * math.e * S**2) - math.log(2 / (FINE - 1))
    V, mean = marginal(d, S)[-1].item(), d.alpha[-1].item() * M
    start = 0.5 * (V + mean**2 - 1 - math.log(V))
    assert total == pytest.approx((entropy + start) / math.log(2), abs=2e-6)


def test_bits_per_dim_is_that_bound():
    """The method: [B], a sum of T + 1 terms, whose mean over noise is the exact figure; the data's levels count."""
    d = GaussianDiffusion(NoiseSchedule.linear(30), variance="fixed_large")
    x0 = torch.tensor([-0.5, 0.25]).repeat(4000)[:, None, None, None].expand(-1, 1, 2, 2)
    bits = d.bits_per_dim(exact(d, 0, 1), x0, generator())
    assert bits.shape == (8000,)
    terms = variational_bound(d, exact(d, 0, 1), x0, generator())
    assert terms.shape == (31, 8000)
    torch.testing.assert_close(terms.sum(0), bits)
    for i, value in enumerate((-0.5, 0.25)):
        mine = bits[i::2]
        expected = normal_bits(torch.tensor(value), 0, 1, 256).item()
        assert mine.mean().item() == pytest.approx(expected, abs=4 * mine.std().item() / math.sqrt(len(mine)) + 1e-4)
    coarse = GaussianDiffusion(d.noise, variance="fixed_large", levels=17)
    lost = variational_bound(coarse, exact(d, 0, 1), x0[:1], generator(), levels=17)
    torch.testing.assert_close(coarse.bits_per_dim(exact(d, 0, 1), x0[:1], generator()), lost.sum(0))
    assert lost[0].item() < terms[0, 0].item()


def test_discrete_data_cost_their_entropy():
    """Four equally likely pictures of two pixels with 17 levels hold 1 bit per dimension. With the exact denoiser and
    1000 steps both figures come near it. The trace grows as 1/σ here: integrated in σ, the ODE would give 0.84."""
    d = GaussianDiffusion(NoiseSchedule.linear(1000), levels=17)
    data = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-0.5, 0.5], [0.25, -0.75]])

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = d.at("alpha", t, x), d.at("sigma", t, x)
        belief = torch.softmax(-(torch.cdist(x, alpha[0] * data) ** 2) / (2 * sigma**2), dim=1)
        return (x - alpha * (belief @ data)) / sigma

    x0 = data.repeat(250, 1)
    assert d.bits_per_dim(model, x0, generator()).mean().item() == pytest.approx(1, abs=0.03)
    assert d.bits_per_dim_ode(model, x0, generator(), steps=111).mean().item() == pytest.approx(1, abs=0.01)


def correlated(d: GaussianDiffusion, covariance: torch.Tensor):
    """The exact network for N(0, covariance): E[x_0 | x_t] = αC(α²C + σ²)⁻¹x_t."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = d.alpha[t[0]], d.sigma[t[0]]
        x0 = x @ (alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(len(covariance))))
        return (x - alpha * x0) / sigma

    return model


COVARIANCE = torch.tensor([[0.3, 0.15, 0.0], [0.15, 0.2, -0.05], [0.0, -0.05, 0.1]], dtype=torch.float64)


def test_the_ode_has_the_exact_density():
    """ln N(x; 0, α_0²C + σ_0²) of correlated data; the error falls with the square of the step."""
    d = GaussianDiffusion(NoiseSchedule.linear(1000))
    total = d.alpha_bar[0] * COVARIANCE + (1 - d.alpha_bar[0]) * torch.eye(3)
    x = double(4, 3) @ torch.linalg.cholesky(total).T
    expected = torch.distributions.MultivariateNormal(torch.zeros(3).double(), total).log_prob(x)
    error = [
        (ode_log_density(d, correlated(d, COVARIANCE), x, steps=n, probes=None) - expected).abs().max()
        for n in (111, 333)
    ]
    assert error[1] < 5e-3
    assert error[1] < error[0] / 5


def test_hutchinson_s_trace_is_unbiased():
    """Random probes on the same x: their mean is the exact trace; for a diagonal Jacobian one probe is enough."""
    d = GaussianDiffusion(NoiseSchedule.linear(100))
    model, x = correlated(d, COVARIANCE), double(1, 3).expand(2000, 3)
    truth = ode_log_density(d, model, x[:1], steps=20, probes=None).item()
    actual = ode_log_density(d, model, x, generator(), steps=20, probes=1)
    assert actual.std() > 0.01
    assert actual.mean().item() == pytest.approx(truth, abs=4 * actual.std().item() / math.sqrt(2000))
    more = ode_log_density(d, model, x, generator(), steps=20, probes=4)
    assert more.std().item() == pytest.approx(actual.std().item() / 2, rel=0.1)
    model = exact(d, M, S)
    estimates = [ode_log_density(d, model, x[:2], generator(), steps=20, probes=p) for p in (None, 1)]
    torch.testing.assert_close(estimates[0], estimates[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_bits_per_dim_by_the_ode_are_exact(prediction: str):
    """p(x)·p(x0 | x)/q(x | x0) = p(x0) by Bayes' rule whatever the noise was: the same figure for every draw."""
    d = GaussianDiffusion(NoiseSchedule.linear(400), prediction, "learned_range", levels=FINE)
    x0 = M + S * double(5, 1, 2, 2).clamp(-2, 2)
    expected = normal_bits(x0, M, S, FINE).flatten(1).mean(1)
    for seed in (0, 1):
        actual = d.bits_per_dim_ode(exact(d, M, S), x0, generator(seed), probes=None)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


def test_the_ode_starts_from_pure_noise_too():
    """Zero terminal SNR: α is 0 at the end, and nothing is divided by it."""
    bars = [math.cos(0.5 * math.pi * (i + 1) / 200) ** 2 for i in range(200)]
    d = GaussianDiffusion(
        NoiseSchedule.from_alphas_cumprod([*bars[:-1], 0.0]), "v_prediction", "learned_range", levels=FINE
    )
    x0 = M + S * double(5, 1).clamp(-2, 2)
    actual = bits_per_dim_ode(d, exact(d, M, S), x0, generator(), levels=FINE, probes=None)
    torch.testing.assert_close(actual, normal_bits(x0, M, S, FINE).flatten(), rtol=0, atol=2e-3)


def test_the_ode_of_one_level_is_the_prior():
    d = GaussianDiffusion(NoiseSchedule.from_betas([0.3]), variance="fixed_large", levels=FINE)
    x0 = double(5, 1).clamp(-0.9, 0.9)
    actual = d.bits_per_dim_ode(exact(d, 0, 1), x0, generator())
    torch.testing.assert_close(actual, normal_bits(x0, 0, 1, FINE).flatten(), rtol=0, atol=1e-5)


def test_steps_must_fit():
    d = GaussianDiffusion(NoiseSchedule.linear(100))
    with pytest.raises(ValueError, match=r"1 … 99"):
        ode_log_density(d, exact(d, M, S), double(1, 1), steps=100)
