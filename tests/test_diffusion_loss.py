"""The objectives against their floors on Gaussian data, their gradients, and importance sampling of times."""

import math

import pytest
import torch
from gaussian import exact, reverse_variance, spread

from diffgen.diffusion import GaussianDiffusion, ImportanceSampler, offset_noise
from diffgen.diffusion.names import WEIGHTS
from schedulers import NoiseSchedule

LINEAR = NoiseSchedule.linear(1000)
PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow_prediction"]
M, S = 0.3, 0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def expected_loss(d: GaussianDiffusion) -> torch.Tensor:
    """[T] E over x0 and ε of the exact denoiser's loss, without chance: a loss that is quadratic in (x0 − m, ε) has the
    expectation l(s, 0) + l(0, 1) − l(0, 0)."""
    t = torch.arange(d.T)

    def at(dx: float, eps: float) -> torch.Tensor:
        x0 = torch.full((d.T, 1), M + dx, dtype=torch.float64)
        return d.loss(exact(d, M, S), x0, t, torch.full_like(x0, eps))

    return at(S, 0.0) + at(0.0, 1.0) - at(0.0, 0.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weight", [*WEIGHTS, None])
def test_the_floor_of_every_weight_and_prediction(prediction: str, weight: str | None):
    """w(SNR)·Var(x_0 | x_t): the same for every prediction if a weight is named; else the prediction's own."""
    d = GaussianDiffusion(LINEAR, prediction, weight=weight)
    snr = d.alpha_bar / (1 - d.alpha_bar)
    own = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1, "flow_prediction": (snr.sqrt() + 1) ** 2}
    w = {
        "x0": 1.0,
        "epsilon": snr,
        "v": snr + 1,
        "min_snr": snr.clamp(max=5),
        "p2": snr / (1 + snr),
        None: own[prediction],
    }[weight]
    torch.testing.assert_close(expected_loss(d), w * spread(d, S), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("prediction", "power"), [("epsilon", 0), ("v_prediction", 1), ("sample", None)])
def test_min_snr_as_its_paper_has_it(prediction: str, power: int | None):
    """min(SNR, γ)/SNR on ε, min(SNR, γ)/(SNR + 1) on v, min(SNR, γ) on x0 (Hang et al. 2023); γ = 3 by a function."""
    d = GaussianDiffusion(LINEAR, prediction, weight=lambda snr: WEIGHTS["min_snr"](snr, gamma=3.0))
    snr = d.alpha_bar / (1 - d.alpha_bar)
    expected = torch.minimum(snr, torch.tensor(3.0)) / (1 if power is None else snr + power)
    torch.testing.assert_close(d.loss_weight, expected, rtol=1e-9, atol=0)


def test_a_weight_is_finite_at_zero_terminal_snr():
    noise = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0])
    for prediction in ("v_prediction", "sample", "flow_prediction"):
        for weight in WEIGHTS:
            assert GaussianDiffusion(noise, prediction, weight=weight).loss_weight.isfinite().all()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_floor_of_the_bound(variance: str):
    """T·E KL in bits, for the exact mean. With V the true reverse variance and σ² that of the model, β̃ the posterior's:
    E KL = ½(ln σ²/β̃ + β̃/σ² − 1 + (V − β̃)/σ²), which for σ² = V is ½·ln V/β̃."""
    d = GaussianDiffusion(LINEAR, variance=variance, objective="vlb")
    V = reverse_variance(d, S)
    of_model = {"fixed_small": d.beta_tilde, "fixed_large": d.beta, "learned_range": V}[variance]
    kl = 0.5 * ((of_model / d.beta_tilde).log() + V / of_model - 1)
    torch.testing.assert_close(expected_loss(d)[1:], 1000 * kl[1:] / math.log(2), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("T", [50, 1000])
def test_hybrid_is_simple_plus_a_thousandth_of_the_sum_over_t(T: int):
    """Improved DDPM eq. 16: its mean over t is E L_simple + λ·Σ_t L_t, for any T."""
    noise = NoiseSchedule.linear(T)
    parts = [
        expected_loss(GaussianDiffusion(noise, "epsilon", "learned_range", objective=o)) for o in ("simple", "vlb")
    ]
    d = GaussianDiffusion(noise, "epsilon", "learned_range", objective="hybrid")
    hybrid = expected_loss(d)
    torch.testing.assert_close(hybrid, parts[0] + 0.001 * parts[1], rtol=1e-9, atol=1e-12)
    kl = 0.5 * (reverse_variance(d, S) / d.beta_tilde).log()[1:] / math.log(2)
    assert (hybrid - parts[0])[1:].mean().item() == pytest.approx(0.001 * T * kl.mean().item(), rel=1e-6)


def test_hybrid_stops_the_gradient_of_the_mean():
    """In L_hybrid the mean is trained by L_simple alone, and v by λ·L_vlb alone; in L_vlb both are."""
    x0, noise, t = double(6, 2, 3, 3).clamp(-1, 1), double(6, 2, 3, 3, seed=1), torch.tensor([0, 1, 5, 100, 700, 999])
    output = 0.5 * double(6, 4, 3, 3, seed=2)

    def gradient(objective: str) -> tuple[torch.Tensor, torch.Tensor]:
        d = GaussianDiffusion(LINEAR, "epsilon", "learned_range", objective=objective)
        y = output.clone().requires_grad_()
        d.loss(lambda x, t: y, x0, t, noise).sum().backward()
        mean, v = y.grad.chunk(2, dim=1)
        return mean, v

    simple, hybrid, vlb = (gradient(o) for o in ("simple", "hybrid", "vlb"))
    assert torch.equal(hybrid[0], simple[0])
    assert simple[1].abs().max() == 0
    torch.testing.assert_close(hybrid[1], 0.001 * vlb[1], rtol=1e-9, atol=1e-15)
    assert (vlb[0].flatten(1).abs().sum(1) > 0).all()
    assert (vlb[1].flatten(1).abs().sum(1) > 0).all()


def test_importance_sampling_is_unbiased():
    """E_p[L_t/(T·p_t)] is the mean of L_t, exactly, and p_t ∝ √E[L_t²] except the part that stays uniform."""
    T, history = 20, 4
    sampler = ImportanceSampler(T, history, uniform=0.01)
    losses = torch.rand(7, T, generator=generator(), dtype=torch.float64) * torch.logspace(0, 3, T)
    for i, row in enumerate(losses):
        assert torch.equal(sampler.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64)) == (i < history)
        sampler.update(torch.arange(T), row)
    size = losses[-history:].square().mean(0).sqrt()
    p = sampler.probabilities()
    torch.testing.assert_close(p, 0.99 * size / size.sum() + 0.01 / T)

    t, weight = sampler.sample(20_000, generator())
    torch.testing.assert_close(weight.double(), 1 / (T * p[t]), rtol=1e-6, atol=0)
    last = losses[-1]
    assert (p * (1 / (T * p)) * last).sum().item() == pytest.approx(last.mean().item())
    drawn = torch.bincount(t, minlength=T) / len(t)
    assert ((drawn - p).abs() <= 5 * (p / len(t)).sqrt()).all()
    uniform = last[torch.randint(T, (20_000,), generator=generator())]
    assert (weight * last[t]).std() < 0.6 * uniform.std()


def test_the_importance_sampler_continues_from_its_state():
    one = ImportanceSampler(5, 2)
    for k in range(3):
        one.update(torch.arange(5), torch.arange(1.0, 6.0) + k)
    one.update(torch.tensor([0, 1]), torch.tensor([float("nan"), float("inf")]))
    two = ImportanceSampler(5, 2)
    two.load_state_dict(one.state_dict())
    for sampler in (one, two):
        sampler.update(torch.tensor([4, 4, 0]), torch.tensor([9.0, 8.0, 7.0]))
    assert torch.equal(one.sample(50, generator())[0], two.sample(50, generator())[0])
    assert one.probabilities().isfinite().all()
    with pytest.raises(ValueError, match="history"):
        ImportanceSampler(6, 2).load_state_dict(one.state_dict())


def test_offset_noise_is_one_number_for_each_picture_and_channel():
    noise = torch.randn(4000, 3, 4, 4, generator=generator())
    offset = offset_noise(noise, 0.5, generator(1)) - noise
    assert offset.flatten(2).std(dim=2).max() < 1e-6
    assert offset.mean((2, 3)).std().item() == pytest.approx(0.5, rel=4 / math.sqrt(2 * 12_000))
    assert torch.equal(offset_noise(noise, 0.0), noise)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="learned_range"):
        GaussianDiffusion(LINEAR, objective="hybrid")
    with pytest.raises(ValueError, match="unknown objective 'l1'"):
        GaussianDiffusion(LINEAR, objective="l1")
    with pytest.raises(ValueError, match="unknown weight 'snr'"):
        GaussianDiffusion(LINEAR, weight="snr")
    with pytest.raises(ValueError, match="levels"):
        GaussianDiffusion(LINEAR, levels=1)
