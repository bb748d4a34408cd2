"""How fast the solvers converge to the exact solution of a Gaussian mixture, and to the exact moments of a Gaussian.

The mixture has 4 elements and 6 components of deviation 0.6. Orders are by function evaluations, all in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from exact_runs import errors, moments, order, sample

from schedulers import grids, registry
from schedulers.exact import Gaussian, Mixture
from schedulers.noise import NoiseSchedule
from schedulers.prediction import Denoised
from schedulers.solver import SOLVERS, run

MIXTURE = Mixture.random(0)
GAUSSIAN = Gaussian([0.3], 0.5)
SCHEDULES = ("scaled_linear", "flow", "edm")

# solver, options, number of exact states at the start (the history of a multistep method), order
ORDERS: list[tuple[str, dict[str, Any], int, float]] = [
    ("euler", {}, 0, 1),
    ("heun", {}, 0, 2),
    ("dpm2", {}, 0, 2),
    ("dpmpp_2s", {}, 0, 2),
    ("dpmpp_2m", {}, 2, 2),
    ("res_multistep", {}, 2, 2),
    ("dpm_solver", {}, 2, 2),
    ("dpm_solver", {"method": "singlestep"}, 0, 2),
    ("dpm_solver", {"method": "singlestep", "order": 3}, 0, 3),
    ("dpm_solver", {"method": "singlestep", "order": 3, "of": "x0"}, 0, 3),
    ("dpmpp_3m", {}, 3, 3),
    ("deis", {}, 3, 3),
    ("deis", {"order": 4}, 4, 4),
    ("lms", {}, 4, 4),
    ("ipndm", {}, 4, 2),
    ("pndm", {}, 0, 2),
    ("unipc", {"order": 1}, 2, 2),
    ("unipc", {}, 3, 3),
    ("unipc", {"variant": "bh1"}, 3, 3),
    ("unipc", {"order": 3}, 4, 4),
    ("sa_solver", {"tau": 0.0}, 3, 2),
    ("gradient_estimation", {}, 0, 1),
    ("heunpp2", {}, 0, 1),
    ("seeds_2", {"eta": 0.0, "variant": "heun"}, 0, 2),
    ("seeds_3", {"eta": 0.0}, 0, 3),
    ("exp_heun_2_x0", {}, 0, 2),
    ("dpm_fast", {}, 0, 2),
    ("dpmpp_2m_v2", {}, 0, 1),
]


@pytest.mark.parametrize(("name", "options", "exact_start", "theory"), ORDERS)
def test_order_with_an_exact_start(name: str, options: dict[str, Any], exact_start: int, theory: float) -> None:
    measured = errors(name, "scaled_linear", "karras", (40, 160), MIXTURE, exact_start=exact_start, **options)
    assert theory - 0.15 < order(measured) < theory + 0.4


def test_a_second_evaluation_of_the_corrected_state() -> None:
    """High order with few steps; with many, the lowered orders of the last steps show, which are of second order."""
    measured = errors("sa_solver_pece", "scaled_linear", "karras", (10, 40, 160, 320), MIXTURE, tau=0.0)
    assert order(measured[:2]) > 4
    assert 1.85 < order(measured[2:]) < 2.4


def test_half_of_the_second_difference_is_of_second_order() -> None:
    """It has less error than the full one with few steps, and more with many."""
    steps = (10, 80, 320)
    half, full = (errors("dpmpp_3m", "scaled_linear", "karras", steps, MIXTURE, variant=v) for v in ("half", "full"))
    assert 1.85 < order(half[1:]) < 2.4
    assert half[0][1] < full[0][1]
    assert half[2][1] > 3 * full[2][1]


NAMES = [
    ("EulerDiscreteScheduler", 1),
    ("DDIMScheduler", 1),
    ("HeunDiscreteScheduler", 2),
    ("KDPM2DiscreteScheduler", 2),
    ("DPMSolverMultistepScheduler", 2),
    ("DPMSolverSinglestepScheduler", 2),
    ("dpmpp_3m", 3),
    ("DEISMultistepScheduler", 3),
    ("UniPCMultistepScheduler", 3),
    ("LMSDiscreteScheduler", 3.6),  # its start is of first order, which shows a little
    ("PNDMScheduler", 2),
    ("IPNDMScheduler", 2),
]


@pytest.mark.parametrize(("label", "theory"), NAMES)
@pytest.mark.parametrize("schedule", ["scaled_linear", "edm"])
def test_order_by_name_alone(label: str, theory: float, schedule: str) -> None:
    """On the Karras grid, from 20 to 80 steps, from pure noise: the start is of low order, but σ is large there."""
    measured = errors(registry.resolve(label)[0], schedule, "karras", (20, 40, 80), MIXTURE)
    assert order(measured) > theory - 0.3


def test_80_evaluations_of_third_order() -> None:
    """Other packages stop at 1e-3 to 1e-4 (rounded times, float32 tables): the error per element at 80 evaluations."""
    for name in ("dpmpp_3m", "deis"):
        ((nfe, error),) = errors(name, "scaled_linear", "karras", (80,), MIXTURE)
        assert nfe == 80
        assert error / math.sqrt(4) < 5e-5


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpmpp_2s"])
def test_flow_from_pure_noise_to_the_picture(name: str) -> None:
    """From α = 0 exactly. λ has no middle in the first step, so the midpoint methods lose a little."""
    measured = errors(name, "flow", "trailing", (40, 160), MIXTURE)
    assert order(measured) > 1.75


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_3m", "deis", "lms", "unipc", "pndm"])
def test_multistep_on_a_flow_converges_from_pure_noise(name: str) -> None:
    (_, e), (_, f) = errors(name, "flow", "trailing", (20, 80), MIXTURE)
    assert f < e / (3.5 if name == "euler" else 7)


# Stochastic solvers: exact mean and variance, no Monte Carlo

WEAK: list[tuple[str, dict[str, Any], float]] = [
    ("euler", {"eta": 0.5}, 1),
    ("euler_ancestral", {}, 1),
    ("ddpm", {}, 1),
    ("edm", {}, 2),
    ("edm", {"method": "euler"}, 1),
    ("dpm2_ancestral", {}, 2),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_sde", {}, 2),  # of first order, if the two noises of a step are independent
    ("dpmpp_sde", {"eta": 0.5}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"variant": "heun"}, 2),
    ("er_sde", {"order": 1}, 1),
    ("er_sde", {"order": 2}, 2),
    ("restart", {}, 2),
    ("restart", {"times": 3}, 2),
    ("sa_solver", {}, 2),
    ("sa_solver_pece", {}, 2),
    ("seeds_2", {}, 2),
    ("seeds_2", {"eta": 0.5, "variant": "heun"}, 2),
    ("exp_heun_2_x0_sde", {}, 2),
    ("res_multistep_ancestral", {}, 2),
]


def exact_deviation(grid: grids.Grid) -> float:
    """The error of the model's x0 at the grid's last noisy point."""
    s = GAUSSIAN.deviations[0].item()
    return s * s / math.hypot(s, grid[-2].rho)


@pytest.mark.parametrize(("name", "options", "theory"), WEAK)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mean_and_variance(name: str, options: dict[str, Any], theory: float, schedule: str) -> None:
    off = []
    for n in (40, 80):
        grid = grids.build("karras", NoiseSchedule.named(schedule), n)
        mean, variance, noises = moments(name, grid, GAUSSIAN, **options)
        assert noises > 0
        assert mean == pytest.approx(0.3, abs=1e-12)
        off.append(abs(math.sqrt(variance) - exact_deviation(grid)))
    assert math.log2(off[0] / off[1]) > theory - 0.3
    assert off[1] < (0.04 if theory == 1 else 0.006)


@pytest.mark.parametrize("name", ["dpmpp_3m_sde", "er_sde", "seeds_3"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variance_at_third_order(name: str, schedule: str) -> None:
    """Their error changes sign, so a rate says little; it is far below that of second order."""
    grid = grids.build("karras", NoiseSchedule.named(schedule), 80)
    mean, variance, _ = moments(name, grid, GAUSSIAN)
    assert mean == pytest.approx(0.3, abs=1e-12)
    assert abs(math.sqrt(variance) - exact_deviation(grid)) < 1e-3


class Distilled(Gaussian):
    """A model with the end of the ODE's solution, at σ/α = `least`, as x0: what few-step models learn."""

    def __init__(self, least: float) -> None:
        super().__init__([0.3], 0.5)
        self.end = math.hypot(0.5, least)

    def denoise(self, x: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = 0.3 + (x - alpha * 0.3) * self.end / math.hypot(alpha * 0.5, sigma)
        return x0, (x - alpha * x0) / sigma


@pytest.mark.parametrize(("name", "options"), [("lcm", {}), ("tcd", {"eta": 1.0}), ("consistency", {})])
@pytest.mark.parametrize("schedule", ["flow", "edm"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_few_step_solvers_are_exact_for_an_exact_model(
    name: str, options: dict[str, Any], schedule: str, n: int
) -> None:
    """Each state then has the exact distribution. For consistency the picture is one at the schedule's least noise."""
    noise = NoiseSchedule.named(schedule)
    model = Distilled(noise.at(t=noise.t_min).rho if name == "consistency" else 0.0)
    mean, variance, noises = moments(name, grids.build("trailing", noise, n), model, **options)
    assert noises == n - 1
    assert mean == pytest.approx(0.3, abs=1e-12)
    assert variance == pytest.approx(model.end**2, abs=1e-10)


def test_learned_variance() -> None:
    """ln variance = f·ln β_t + (1−f)·ln β̃_t with f = (v+1)/2, from the second half of the channels."""
    noise = NoiseSchedule.linear(100)
    grid = grids.build("trailing", noise, 100)
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, eps = torch.randn_like(x), torch.randn_like(x)
    v = torch.rand_like(x) * 2 - 1

    def step(variance: str, output: torch.Tensor, k: int) -> torch.Tensor:
        steps = SOLVERS["ddpm"].function(x, grid[k : k + 2], lambda p, q: z, variance=variance)
        return run(steps, lambda state, p: Denoised(state, output, p, "epsilon"))[0]

    for k in (0, 50, 98):  # t = 99, 49, 1
        t = 99 - k
        beta, bar, before = noise.betas[t], noise.alphas_cumprod[t], noise.alphas_cumprod[t - 1]
        posterior = beta * (1 - before) / (1 - bar)
        mean = (x - beta / math.sqrt(1 - bar) * eps) / math.sqrt(1 - beta)  # DDPM eq. 11
        f = (v + 1) / 2
        expected = mean + torch.exp(0.5 * (f * math.log(beta) + (1 - f) * math.log(posterior))) * z
        assert (step("learned", torch.cat([eps, v], 1), k) - expected).abs().max() < 1e-10
        assert (step("fixed_small", eps, k) - (mean + math.sqrt(posterior) * z)).abs().max() < 1e-10
        assert (step("fixed_large", eps, k) - (mean + math.sqrt(beta) * z)).abs().max() < 1e-10
    with pytest.raises(ValueError, match="6 channels"):
        step("learned", eps, 0)


def test_churn_asks_at_the_raised_level() -> None:
    """EDM algorithm 2: first noise, then the evaluation at σ̂ = σ(1 + γ); no noise outside the range."""
    noise = NoiseSchedule.edm()
    grid = grids.build("karras", noise, 10)
    levels: list[float] = []
    x = torch.zeros(1, 1, dtype=torch.float64)

    def answer(state: torch.Tensor, p: Any) -> Denoised:
        levels.append(p.rho)
        return Denoised(state, state * 0, p, "epsilon")

    options = {"s_churn": 2.0, "s_tmin": 0.05, "s_tmax": 50.0, "method": "euler"}
    run(SOLVERS["edm"].function(x, grid, lambda p, q: torch.ones_like(x), **options), answer)
    expected = [p.rho * (1.2 if 0.05 <= p.rho <= 50 else 1.0) for p in grid.points[:-1]]
    assert levels == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["ddim_inverse", "dpmpp_2m_inverse"])
def test_inversion_is_undone_by_euler(name: str) -> None:
    """Picture → noise → picture: the error falls with the size of the steps."""
    noise, measured = NoiseSchedule.scaled_linear(), []
    picture = MIXTURE.draw(24, torch.Generator().manual_seed(0))
    for n in (50, 200):
        grid = grids.build("trailing", noise, n)
        x, nfe = sample(name, grid, picture, MIXTURE)
        assert nfe == (n if name == "ddim_inverse" else n - 1)
        back, _ = sample("euler", grid, x, MIXTURE)
        measured.append((back - picture).norm(dim=1).median().item())
    assert measured[1] < measured[0] / 3


def test_multistep_inversion_follows_the_solution() -> None:
    """From a state at the least noise to the noisiest level: the error is of second order."""
    noise, off = NoiseSchedule.scaled_linear(), []
    picture = MIXTURE.draw(24, torch.Generator().manual_seed(0))
    for n in (40, 160):
        grid = grids.build("karras", noise, n)
        x, _ = sample("dpmpp_2m_inverse", grid, picture, MIXTURE)
        off.append((x - MIXTURE.solve(picture, grid[-2], grid[0])).norm(dim=1).median().item())
    assert 1.7 < math.log2(off[0] / off[1]) / 2 < 2.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adaptive_steps(schedule: str) -> None:
    """A tighter tolerance costs more evaluations and brings a smaller error, whatever the grid's points between."""
    runs = {}
    for rtol, steps in ((0.05, 20), (0.05, 40), (0.001, 20)):
        grid = grids.build("karras", NoiseSchedule.named(schedule), steps)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * grid[0].sigma
        runs[rtol, steps] = sample("dpm_adaptive", grid, x, MIXTURE, rtol=rtol, atol=rtol * 0.156)
        if schedule != "flow":
            exact = MIXTURE.denoise(MIXTURE.solve(x, grid[0], grid[-2]), grid[-2].alpha, grid[-2].sigma)[0]
            assert (runs[rtol, steps][0] - exact).norm(dim=1).median() < (0.05 if rtol > 0.01 else 0.001)
    assert runs[0.05, 20][1] < runs[0.001, 20][1] < 1000
    if schedule != "flow":  # there the first point below pure noise is the grid's own
        assert torch.equal(runs[0.05, 20][0], runs[0.05, 40][0])
