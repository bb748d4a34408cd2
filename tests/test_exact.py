"""The exact models against numerical integration, against each other, and against themselves with finer steps."""

from __future__ import annotations

import math

import pytest
import torch

from schedulers.exact import Gaussian, Mixture
from schedulers.noise import CLEAN, NoiseSchedule, Point
from schedulers.prediction import Denoised

LEVELS = [(1.0, 0.3), (0.8, 0.6), (0.3, 0.7), (1.0, 20.0), (0.05, 0.9987)]


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_denoise_is_the_conditional_mean(alpha: float, sigma: float) -> None:
    """E[x0|x] = ∫ x0·p(x0)·p(x|x0) dx0 / ∫ …, by a fine sum in one dimension."""
    means, deviations, weights = [[-1.0], [0.5], [2.0]], [0.3, 0.5, 0.2], [0.2, 0.5, 0.3]
    model = Mixture(means, deviations, weights)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    grid = torch.linspace(-6, 8, 100_001, dtype=torch.float64)
    density = sum(
        w / s * torch.exp(-0.5 * ((grid - m[0]) / s) ** 2) for m, s, w in zip(means, deviations, weights, strict=True)
    )
    joint = density * torch.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)
    expected = (joint * grid).sum(1, keepdim=True) / joint.sum(1, keepdim=True)
    x0, eps = model.denoise(x, alpha, sigma)
    assert (x0 - expected).abs().max() < 1e-9
    assert (alpha * x0 + sigma * eps - x).abs().max() < 1e-12


def test_denoise_at_the_ends() -> None:
    model = Mixture.random(0)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0, eps = model.denoise(x, 1.0, 0.0)
    assert torch.allclose(x0, x, atol=1e-14)
    assert torch.count_nonzero(eps) == 0
    x0, eps = model.denoise(x, 0.0, 1.0)
    assert torch.allclose(x0, (model.weights[:, None] * model.means).sum(0).expand(5, 4), atol=1e-14)
    assert torch.allclose(eps, x, atol=1e-14)


@pytest.mark.parametrize("schedule", ["scaled_linear", "flow", "edm"])
def test_the_solution_of_a_gaussian(schedule: str) -> None:
    """The integration for a mixture of one component gives the closed form of one Gaussian, from end to end."""
    noise = NoiseSchedule.named(schedule)
    gaussian, mixture = Gaussian([0.3, -1.0], 0.5), Mixture([[0.3, -1.0]], 0.5)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * noise.noisiest.sigma
    for q in (noise.at(lam=0.1), noise.at(t=noise.t_min), CLEAN):
        assert (gaussian.solve(x, noise.noisiest, q) - mixture.solve(x, noise.noisiest, q)).abs().max() < 1e-10
    start = gaussian.solve(x, noise.noisiest, CLEAN)
    assert (gaussian.solve(start, CLEAN, noise.noisiest) - x).abs().max() < 1e-10


def test_the_solution_of_a_mixture() -> None:
    """Finer steps change nothing, the reverse solution returns to the start, and the frames agree."""
    model, noise = Mixture.random(0), NoiseSchedule.scaled_linear()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = noise.noisiest, noise.at(t=0.0)
    y = model.solve(x, p, q)
    assert (y - model.solve(x, p, q, intervals=36)).abs().max() < 1e-10
    assert (model.solve(y, q, p) - x).abs().max() < 1e-8
    edm = model.solve(x / p.alpha, Point(0.0, 1.0, p.rho), Point(0.0, 1.0, q.rho))
    assert (edm - y / q.alpha).abs().max() < 1e-10


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_the_denoiser_has_every_prediction(prediction: str) -> None:
    model, noise = Mixture.random(0, elements=12), NoiseSchedule.scaled_linear()
    x = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20.0, 500.5, 999.0])
    out = model.denoiser(noise, prediction)(x, t)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    for i in range(3):
        p = noise.at(t=t[i].item())
        x0, eps = model.denoise(x[i : i + 1].double(), p.alpha, p.sigma)
        d = Denoised(x[i : i + 1].double(), out[i : i + 1].double(), p, prediction)
        assert (d.x0 - x0).abs().max() < 1e-4
        assert (d.eps - eps).abs().max() < 1e-4


def test_draw() -> None:
    model = Mixture([[0.0, 0.0], [10.0, 0.0]], [0.5, 1.0], [3.0, 1.0])
    x = model.draw(20_000, torch.Generator().manual_seed(0))
    near = x[:, 0] < 5
    assert near.double().mean().item() == pytest.approx(0.75, abs=0.02)
    assert x[near].std().item() == pytest.approx(0.5, abs=0.02)
    assert x[~near, 1].std().item() == pytest.approx(1.0, abs=0.04)
    assert math.isclose(model.weights.sum().item(), 1.0)


@pytest.mark.parametrize(
    ("means", "deviations", "weights"),
    [([0.0, 1.0], 0.5, None), ([[0.0]], 0.0, None), ([[0.0], [1.0]], 0.5, [1.0, 0.0])],
)
def test_refused_mixtures(means: list, deviations: float, weights: list | None) -> None:
    with pytest.raises(ValueError, match=r"mixture|means"):
        Mixture(means, deviations, weights)
