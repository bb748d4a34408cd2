"""Rules for every solver: identities, frames, predictions, counts, mid-way starts, edits, the two ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from exact_runs import answer, from_prior, sample
from torch import Tensor

import schedulers
from schedulers import grids
from schedulers.exact import Mixture
from schedulers.grid import Grid
from schedulers.noise import CLEAN, NoiseSchedule, Point
from schedulers.prediction import Denoised, target
from schedulers.solver import SOLVERS, evaluation_points, matching_rest, run

MIXTURE = Mixture.random(0)
ALL = sorted(SOLVERS)
FORWARD = [n for n in ALL if not SOLVERS[n].upwards]
LISTED = [n for n in FORWARD if not SOLVERS[n].native_only]  # their evaluations are known beforehand
TWO = [n for n in LISTED if SOLVERS[n].evaluations_per_step == 2]
ONE_STEP = ["euler", "euler_ancestral", "ddpm", "heun", "dpm2", "dpmpp_2s", "dpmpp_sde", "consistency", "tcd"]

SD = NoiseSchedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()


def karras(n: int, noise: NoiseSchedule = SD) -> Grid:
    return grids.build("karras", noise, n)


def draws(p: Point, q: Point) -> Tensor:
    """The same noise for the same interval, for every solver."""
    generator = torch.Generator().manual_seed(round(p.t * 1000) * 1_000_003 + round(q.t * 1000))
    return torch.randn(24, 4, generator=generator, dtype=torch.float64)


def states(name: str, grid: Grid, **options: Any) -> list[Tensor]:
    """The state and point of each evaluation, and the result."""
    states: list[Tensor] = []

    def denoise(x: Tensor, p: Point) -> Denoised:
        states.append(x)
        x0, _ = MIXTURE.denoise(x, p.alpha, p.sigma)
        return Denoised(x, x0, p, "sample")

    result, _ = run(SOLVERS[name].function(from_prior(grid.noise, MIXTURE, 24), grid, draws, **options), denoise)
    return [*states, result]


# The same algorithm under several names


SAME: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("euler_ancestral", {}, "euler", {"eta": 1.0}),
    ("euler_ancestral", {"eta": 0.0}, "euler", {}),
    ("ddpm", {}, "euler_ancestral", {}),
    ("deis", {"order": 1}, "euler", {}),
    ("dpm_solver", {"order": 1}, "euler", {}),
    ("dpm_solver", {"order": 1, "of": "x0"}, "euler", {}),
    ("dpm_solver", {"order": 1, "method": "singlestep"}, "euler", {}),
    ("lms", {"order": 1}, "euler", {}),
    ("ipndm", {"order": 1}, "euler", {}),
    ("tcd", {"eta": 0.0}, "euler", {}),
    ("edm", {"s_churn": 0.0, "method": "euler"}, "euler", {}),
    ("edm", {"s_churn": 0.0}, "heun", {}),
    ("restart", {"times": 0}, "heun", {}),
    ("dpm2_ancestral", {"eta": 0.0}, "dpm2", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, "dpmpp_2s", {}),
    ("dpmpp_sde", {"eta": 0.0}, "dpmpp_2s", {}),
    ("ipndm_v", {}, "lms", {}),
    ("dpm_solver", {"order": 2, "of": "x0"}, "dpmpp_2m", {}),
    ("dpm_solver", {"order": 3, "of": "x0"}, "dpmpp_3m", {}),
    ("dpm_solver", {"order": 3}, "deis", {}),
    ("res_multistep", {}, "dpmpp_2m", {"variant": "heun"}),
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
    ("dpmpp_2m_sde", {"eta": 0.0, "variant": "heun"}, "res_multistep", {}),
    ("dpmpp_3m_sde", {"eta": 0.0}, "dpmpp_3m", {}),
    ("sa_solver", {"tau": 0.0, "corrector_order": 3}, "unipc", {"variant": "bh1"}),
    ("gradient_estimation", {"gamma": 1.0}, "euler", {}),
    ("seeds_2", {"eta": 0.0}, "dpmpp_2s", {}),
    ("seeds_2", {}, "dpmpp_sde", {}),
    ("seeds_2", {"r": 1.0, "variant": "heun"}, "exp_heun_2_x0_sde", {}),
    ("exp_heun_2_x0_sde", {"eta": 0.0}, "exp_heun_2_x0", {}),
    ("res_multistep_ancestral", {"eta": 0.0}, "res_multistep", {}),
]


@pytest.mark.parametrize(("name", "options", "other", "others"), SAME)
def test_identical_algorithms(name: str, options: dict[str, Any], other: str, others: dict[str, Any]) -> None:
    for a, b in zip(states(name, karras(12), **options), states(other, karras(12), **others), strict=True):
        assert (a - b).abs().max() < 1e-10


def test_the_first_order_of_sde_solvers_is_euler_ancestral() -> None:
    expected = states("euler_ancestral", karras(12))[1]
    for name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        assert (states(name, karras(12))[1] - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("name", "of"), [("dpm2", "eps"), ("dpmpp_2s", "x0")])
def test_midpoint_methods_are_single_step_solvers_on_a_grid_with_the_middles(name: str, of: str) -> None:
    coarse = karras(10)
    fine = [coarse[0]]
    for p, q in zip(coarse.points[:-2], coarse.points[1:-1], strict=True):
        fine += [SD.at(lam=(p.lam + q.lam) / 2), q]
    a = states(name, coarse)
    b = states("dpm_solver", Grid([*fine, CLEAN], SD), method="singlestep", of=of)
    assert max((u - v).abs().max() for u, v in zip(a, b, strict=True)) < 1e-10


def test_dpmpp_2m_sde_in_the_formulas_of_k_diffusion() -> None:
    """In the frame x/α, with the published coefficients and the same noise."""
    grid = karras(8, NoiseSchedule.edm())
    start = x = from_prior(grid.noise, MIXTURE, 24)
    old, last = None, 0.0
    for p, q in grid.pairs():
        D = MIXTURE.denoise(x, 1.0, p.sigma)[0]
        if q.sigma == 0:
            x = D
            break
        h = math.log(p.sigma / q.sigma)
        x = (q.sigma / p.sigma) * math.exp(-h) * x - math.expm1(-2 * h) * D
        if old is not None:
            x = x - 0.5 * math.expm1(-2 * h) * (h / last) * (D - old)
        x = x + q.sigma * math.sqrt(-math.expm1(-2 * h)) * draws(p, q)
        old, last = D, h
    assert (sample("dpmpp_2m_sde", grid, start, MIXTURE, noise=draws)[0] - x).abs().max() < 1e-9


VE = NoiseSchedule.edm()  # α = 1, the frame of k-diffusion and ComfyUI


def exact_x0(x: Tensor, sigma: float) -> Tensor:
    return MIXTURE.denoise(x, 1.0, sigma)[0]


def phi_1(h: float) -> float:
    """h·φ₁(h) = eʰ − 1."""
    return math.expm1(h)


def phi_2(h: float) -> float:
    """h·φ₂(h) = (eʰ − 1 − h)/h."""
    return (math.expm1(h) - h) / h


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_seeds_2_in_the_formulas_of_its_paper(variant: str) -> None:
    """SEEDS (2305.14267), data prediction, with both noises of a step."""
    grid, eta, r = karras(8, VE), 0.7, 0.4
    start = x = from_prior(VE, MIXTURE, 24)
    for p, q in grid.pairs():
        d = exact_x0(x, p.sigma)
        if q.sigma == 0:
            x = d
            break
        h = math.log(p.sigma / q.sigma)
        s = VE.at(lam=p.lam + r * h)
        z, w = draws(p, s), draws(s, q)
        drawn = math.sqrt(-math.expm1(-2 * r * h * eta)) * z
        y = s.sigma / p.sigma * math.exp(-r * h * eta) * x - phi_1(-r * h * (1 + eta)) * d + s.sigma * drawn
        e = exact_x0(y, s.sigma)
        b2 = phi_2(-h * (1 + eta)) / r if variant == "heun" else phi_1(-h * (1 + eta)) / (2 * r)
        drawn = drawn * math.exp((r - 1) * h * eta) + math.sqrt(-math.expm1(2 * (r - 1) * h * eta)) * w
        x = q.sigma / p.sigma * math.exp(-h * eta) * x + q.sigma * drawn
        x = x - (phi_1(-h * (1 + eta)) - b2) * d - b2 * e
    options = {"eta": eta, "r": r, "variant": variant}
    assert (sample("seeds_2", grid, start, MIXTURE, noise=draws, **options)[0] - x).abs().max() < 1e-9


def test_seeds_3_in_the_formulas_of_its_paper() -> None:
    """SEEDS (2305.14267), data prediction, deterministic: r₁ = 1/3, r₂ = 2/3."""
    grid = karras(8, VE)
    start = x = from_prior(VE, MIXTURE, 24)
    for p, q in grid.pairs():
        d = exact_x0(x, p.sigma)
        if q.sigma == 0:
            x = d
            break
        h = math.log(p.sigma / q.sigma)
        s, m = VE.at(lam=p.lam + h / 3), VE.at(lam=p.lam + h * 2 / 3)
        e = exact_x0(s.sigma / p.sigma * x - phi_1(-h / 3) * d, s.sigma)
        a = 2 * phi_2(-h * 2 / 3)
        f = exact_x0(m.sigma / p.sigma * x - (phi_1(-h * 2 / 3) - a) * d - a * e, m.sigma)
        b = phi_2(-h) * 3 / 2
        x = q.sigma / p.sigma * x - (phi_1(-h) - b) * d - b * f
    assert (sample("seeds_3", grid, start, MIXTURE, eta=0.0)[0] - x).abs().max() < 1e-9


def test_gradient_estimation_in_the_formulas_of_its_paper() -> None:
    """Permenter and Yuan (2306.04848): ε̄ = γ·ε + (1 − γ)·ε of the step before."""
    grid, gamma, old = karras(8, VE), 2.0, None
    start = x = from_prior(VE, MIXTURE, 24)
    for p, q in grid.pairs():
        eps = MIXTURE.denoise(x, 1.0, p.sigma)[1]
        mean = eps if old is None or q.sigma == 0 else gamma * eps + (1 - gamma) * old
        x, old = x + mean * (q.sigma - p.sigma), eps
    assert (sample("gradient_estimation", grid, start, MIXTURE)[0] - x).abs().max() < 1e-9


def test_heunpp2_in_the_formulas_of_comfyui() -> None:
    grid = karras(8, VE)
    start = x = from_prior(VE, MIXTURE, 24)
    sigmas = [p.sigma for p in grid.points]

    def slope(state: Tensor, sigma: float) -> Tensor:
        return (state - exact_x0(state, sigma)) / sigma

    for i, (now, to) in enumerate(pairwise(sigmas)):
        mean = one = slope(x, now)
        if to > 0:
            second = x + one * (to - now)
            two, after = slope(second, to), sigmas[i + 2]
            weight = to / ((3 if after > 0 else 2) * sigmas[0])
            mean = (1 - weight) * one + weight * two
            if after > 0:
                third = after / (3 * sigmas[0])
                mean = mean + third * (slope(second + two * (after - to), after) - one)
        x = x + mean * (to - now)
    assert (sample("heunpp2", grid, start, MIXTURE)[0] - x).abs().max() < 1e-9


def test_res_multistep_ancestral_in_the_formulas_of_comfyui() -> None:
    grid, eta = karras(8, VE), 0.6
    start = x = from_prior(VE, MIXTURE, 24)
    old = before = lower = None
    for p, q in grid.pairs():
        d = exact_x0(x, p.sigma)
        if q.sigma == 0:
            x = d
            break
        up = min(q.sigma, eta * math.sqrt(q.sigma**2 * (p.sigma**2 - q.sigma**2) / p.sigma**2))
        down = math.sqrt(q.sigma**2 - up**2)
        h = math.log(p.sigma / down)
        b = 0.0 if old is None else phi_2(-h) / (math.log(lower / before) / h)
        x = down / p.sigma * x - (phi_1(-h) - b) * d - b * (d if old is None else old)
        x = x + up * draws(p, q)
        old, before, lower = d, p.sigma, down
    result = sample("res_multistep_ancestral", grid, start, MIXTURE, noise=draws, eta=eta)[0]
    assert (result - x).abs().max() < 1e-9


def run_in_sigma(grid: Grid, weights: Callable[[list[float], float], list[float]]) -> tuple[Tensor, Tensor]:
    """(start, result) on a VE schedule of x + Σ w_j·ε_j; `weights` of the levels so far, newest last, and the next."""
    start = x = from_prior(VE, MIXTURE, 24)
    levels: list[float] = []
    slopes: list[Tensor] = []
    for p, q in grid.pairs():
        x0 = exact_x0(x, p.sigma)
        if q.sigma == 0:
            return start, x0
        levels, slopes = [*levels, p.sigma], [*slopes, (x - x0) / p.sigma]
        x = x + sum(w * d for w, d in zip(weights(levels, q.sigma), reversed(slopes), strict=False))
    raise AssertionError("the grid has no end")


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_in_the_formulas_of_diff_sampler(order: int) -> None:
    """With the steps h, h₁, h₂, h₃, the newest first, and without the parentheses in (1 − h/(3(h + h₁)))·…"""

    def weights(levels: list[float], to: float) -> list[float]:
        all_levels = [to, *reversed(levels)]
        n, h = min(order, len(levels)), [new - old for new, old in pairwise(all_levels)]
        if n == 1:
            return [h[0]]
        c = [1 + h[0] / h[1] / 2, -h[0] / h[1] / 2]
        if n == 2:
            return [h[0] * w for w in c]
        r = h[1] / h[2]
        a = 0.5 * (1 - h[0] / (3 * (h[0] + h[1])) * h[0] * (h[0] + h[1]) / (h[1] * (h[1] + h[2])))
        c = [c[0] + a, c[1] - (1 + r) * a, r * a]
        if n == 3:
            return [h[0] * w for w in c]
        two, three, all_four = h[0] + h[1], h[0] + h[1] + h[2], h[1] + h[2] + h[3]
        b = 0.5 * (1 - h[0] / (3 * two)) + (1 - h[0] / (2 * two)) * h[0] / (6 * three)
        b *= h[0] * two * three / (h[1] * (h[1] + h[2]) * all_four)
        f = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
        c = [c[0] + b, c[1] - (1 + r + f) * b, c[2] + (r + f * (1 + h[2] / h[3])) * b, -f * r * b]
        return [h[0] * w for w in c]

    grid = karras(9, VE)
    start, expected = run_in_sigma(grid, weights)
    result = sample("ipndm_v", grid, start, MIXTURE, order=order, variant="diff-sampler")[0]
    assert (result - expected).abs().max() < 1e-9
    exact = sample("ipndm_v", grid, start, MIXTURE, order=order)[0]
    assert ((result - exact).abs().max() < 1e-9) == (order < 3)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_in_the_time_of_the_vp_sde(order: int) -> None:
    """tAB: polynomials in the t with ᾱ = exp(−β_d·t²/2 − β_min·t), integrated by the midpoint rule."""
    small, large = math.log1p(0.002**2), math.log1p(80.0**2)
    beta_d = (large - small / 0.001) * 2 / (1 - 0.001)
    beta_min = large - beta_d / 2

    def time(sigma: Any) -> Any:
        grown = torch.log1p(torch.as_tensor(sigma, dtype=torch.float64) ** 2)
        return ((beta_min**2 + 2 * beta_d * grown).sqrt() - beta_min) / beta_d

    def weights(levels: list[float], to: float) -> list[float]:
        ends = torch.linspace(levels[-1], to, 20_001, dtype=torch.float64)
        middles = time((ends[1:] + ends[:-1]) / 2)
        nodes = time(levels[::-1][:order])
        result = []
        for j, node in enumerate(nodes):
            others = torch.cat([nodes[:j], nodes[j + 1 :]])
            basis = ((middles[:, None] - others) / (node - others)).prod(1)
            result.append(float((basis * ends.diff()).sum()))
        return result

    grid = karras(9, VE)
    start, expected = run_in_sigma(grid, weights)
    result = sample("deis", grid, start, MIXTURE, order=order, variable="t")[0]
    assert (result - expected).abs().max() < 1e-6


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("pece", [False, True])
def test_sa_solver_in_the_formulas_of_comfyui(tau: float, pece: bool) -> None:
    """Orders 3 and 4, lowered to 1 in the step before the last, exact polynomials, τ at the end of a step."""
    grid = karras(9, VE)
    levels = [p.sigma for p in grid.points]
    lams = [-math.log(sigma) for sigma in levels[:-1]]
    N = len(levels) - 1

    def weights(nodes: list[float], a: float, b: float, t: float) -> list[float]:
        """∫ of each Lagrange polynomial times (1 + τ²)·e^(−(1 + τ²)(b − λ)) from a to b."""
        k = 1 + t * t
        edges = torch.linspace(a, b, 20_001, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2
        density = k * torch.exp(-k * (b - middles)) * edges.diff()
        result = []
        for j, node in enumerate(nodes):
            basis = torch.ones_like(middles)
            for i, other in enumerate(nodes):
                basis = basis * ((middles - other) / (node - other)) if i != j else basis
            result.append(float((basis * density).sum()))
        return result

    start = x = predicted = from_prior(VE, MIXTURE, 24)
    found: list[Tensor] = []
    t, noise = 0.0, torch.zeros_like(start)
    for i in range(N):
        found.append(exact_x0(predicted, levels[i]))
        if i == N - 1 and not pece:
            x = found[-1]
            break
        if i > 0:
            order = min(4, len(found), N - i)
            w = weights(lams[i - order + 1 : i + 1], lams[i - 1], lams[i], t)
            decay = math.exp(-t * t * (lams[i] - lams[i - 1])) * levels[i] / levels[i - 1]
            x = decay * x + sum(c * f for c, f in zip(w, found[-order:], strict=True)) + noise
            found[-1] = exact_x0(x, levels[i]) if pece else found[-1]
        if i == N - 1:
            x = found[-1]
            break
        order = min(3, len(found), N - 1 - i)
        t = tau if 0.05 <= levels[i + 1] <= 1 else 0.0
        h = lams[i + 1] - lams[i]
        w = weights(lams[i - order + 1 : i + 1], lams[i], lams[i + 1], t)
        noise = levels[i + 1] * math.sqrt(-math.expm1(-2 * t * t * h)) * draws(grid[i], grid[i + 1])
        decay = math.exp(-t * t * h) * levels[i + 1] / levels[i]
        predicted = decay * x + sum(c * f for c, f in zip(w, found[-order:], strict=True)) + noise
    if pece:
        result = sample("sa_solver_pece", grid, start, MIXTURE, noise=draws, tau=tau)[0]
        assert (result - x).abs().max() < 1e-6
        return
    options = schedulers.parse("comfyui_sa_solver").options
    result = sample("sa_solver", grid, start, MIXTURE, noise=draws, tau=tau, **options)[0]
    assert (result - x).abs().max() < 1e-6
    assert (result - sample("sa_solver", grid, start, MIXTURE, noise=draws, tau=tau)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 12])
def test_dpm_fast_in_the_formulas_of_k_diffusion(n: int) -> None:
    """The whole plan for n − 1 evaluations, from the largest level to the least, and the network's x0 there."""
    grid = karras(n, VE)
    start = x = from_prior(VE, MIXTURE, 24)
    ends, left = (math.log(grid[0].sigma), math.log(grid[-2].sigma)), n - 1
    m = left // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if left % 3 == 0 else [3] * (m - 1) + [left % 3]

    def slope(state: Tensor, s: float) -> Tensor:
        return (state - exact_x0(state, math.exp(-s))) / math.exp(-s)

    for i, order in enumerate(orders if left else []):
        t, to = (-ends[0] + (ends[0] - ends[1]) * j / m for j in (i, i + 1))
        h, eps = to - t, slope(x, t)
        one = x - math.exp(-to) * math.expm1(h) * eps
        if order == 2:
            s = t + h / 2
            change = slope(x - math.exp(-s) * math.expm1(h / 2) * eps, s) - eps
            one = one - math.exp(-to) * math.expm1(h) * change
        if order == 3:
            s, u = t + h / 3, t + h * 2 / 3
            change = slope(x - math.exp(-s) * math.expm1(h / 3) * eps, s) - eps
            y = x - math.exp(-u) * (
                math.expm1(h * 2 / 3) * eps + 2 * (math.expm1(h * 2 / 3) / (h * 2 / 3) - 1) * change
            )
            one = one - math.exp(-to) * 1.5 * (math.expm1(h) / h - 1) * (slope(y, u) - eps)
        x = one
    result, nfe = sample("dpm_fast", grid, start, MIXTURE)
    assert nfe == n
    assert (result - exact_x0(x, grid[-2].sigma)).abs().max() < 1e-9


def test_dpmpp_2m_v2_in_the_formulas_of_stable_diffusion_cpp() -> None:
    grid = karras(8, VE)
    start = x = from_prior(VE, MIXTURE, 24)
    old, last = None, 0.0
    for p, q in grid.pairs():
        d = exact_x0(x, p.sigma)
        if q.sigma == 0:
            x = d
            break
        h = math.log(p.sigma / q.sigma)
        if old is None:
            x = q.sigma / p.sigma * x - math.expm1(-h) * d
        else:
            r = max(last, h) / min(last, h)
            mixed = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * old
            x = q.sigma / p.sigma * x - math.expm1(-(last + h) / 2) * mixed
        old, last = d, h
    assert (sample("dpmpp_2m_v2", grid, start, MIXTURE)[0] - x).abs().max() < 1e-9


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_of_the_second_difference_in_the_formulas_of_k_diffusion(eta: float) -> None:
    """Its sample_dpmpp_3m_sde, in the frame x/α."""
    grid = karras(9, VE)
    start = x = from_prior(VE, MIXTURE, 24)
    past: list[tuple[Tensor, float]] = []  # x0 and the length in λ of each step before, the latest first
    for p, q in grid.pairs():
        d = exact_x0(x, p.sigma)
        if q.sigma == 0:
            x = d
            break
        h = math.log(p.sigma / q.sigma)
        g = h * (eta + 1)
        x = math.exp(-g) * x - math.expm1(-g) * d
        f = math.expm1(-g) / g + 1
        if len(past) == 1:
            x = x + f * (d - past[0][0]) * (h / past[0][1])
        elif past:
            (d1, h1), (d2, h2) = past
            r0, r1 = h1 / h, h2 / h
            near, far = (d - d1) / r0, (d1 - d2) / r1
            x = x + f * (near + (near - far) * r0 / (r0 + r1)) - (f / g - 0.5) * (near - far) / (r0 + r1)
        x = x + q.sigma * math.sqrt(-math.expm1(-2 * h * eta)) * draws(p, q)
        past = [(d, h), *past][:2]
    result = sample("dpmpp_3m_sde", grid, start, MIXTURE, noise=draws, eta=eta, variant="half")[0]
    if eta == 0:
        assert (sample("dpmpp_3m", grid, start, MIXTURE, variant="half")[0] - result).abs().max() < 1e-12
    assert (result - x).abs().max() < 1e-9


def test_er_sde_in_the_formulas_of_its_paper() -> None:
    """The first two stages in the frame x/α, the integral of 1/φ as a fine sum."""

    def phi(rho: Any) -> Any:
        return rho * (math.exp(rho**0.3) + 10)

    grid = karras(8)
    start = x = from_prior(SD, MIXTURE, 24)
    old: Any = None
    for p, q in grid.pairs():
        D = MIXTURE.denoise(x, p.alpha, p.sigma)[0]
        if q.sigma == 0:
            x = D
            break
        r = phi(q.rho) / phi(p.rho)
        y = r * (x / p.alpha) + (1 - r) * D
        if old is not None:
            n, width = 20_000, p.rho - q.rho
            integral = sum(width / n / phi(q.rho + (i + 0.5) * width / n) for i in range(n))
            y = y + (q.rho - p.rho + phi(q.rho) * integral) * (D - old[0]) / (p.rho - old[1])
        y = y + math.sqrt(q.rho**2 - p.rho**2 * r * r) * draws(p, q)
        x, old = q.alpha * y, (D, p.rho)
    assert (sample("er_sde", grid, start, MIXTURE, noise=draws, order=2)[0] - x).abs().max() < 1e-6


def test_dpmpp_sde_has_one_brownian_path_a_step() -> None:
    """If x0 does not change, the step through the middle equals two steps of euler_ancestral, with their noises."""
    grid = karras(6)
    p, q = grid[1], grid[2]
    m = SD.at(lam=(p.lam + q.lam) / 2)
    x = from_prior(SD, MIXTURE, 24)

    def still(state: Tensor, at: Point) -> Denoised:
        return Denoised(state, torch.full_like(state, 0.3), at, "sample")

    once = run(SOLVERS["dpmpp_sde"].function(x, Grid([p, q], SD), draws), still)[0]
    twice = run(SOLVERS["euler_ancestral"].function(x, Grid([p, m, q], SD), draws), still)[0]
    assert (once - twice).abs().max() < 1e-12


# Frames and predictions


@pytest.mark.parametrize("name", [n for n in LISTED if n not in ("lcm", "tcd", "consistency")])
def test_frames_agree(name: str) -> None:
    """The same σ/α in a variance-preserving, an exploding and a flow model: the same picture, state for state.

    Excepted: Heun's step and heunpp2's weights, which use σ on a flow, and what is defined by the time t or the
    schedule's end.
    """
    rhos = [p.rho for p in karras(10).points[:-1]]
    options: dict[str, Any] = {
        "sa_solver": {"tau": 0.0},
        "sa_solver_pece": {"tau": 0.0},
        "edm": {"method": "euler", "s_churn": 0.0},
    }.get(name, {})
    z = torch.randn(40, 24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for noise in (SD, NoiseSchedule.edm(0.01, 20.0), NoiseSchedule.flow()):
        if noise.name == "flow" and name in ("heun", "heunpp2", "restart", "pndm"):
            continue
        grid, drawn = Grid([*(noise.at(lam=-math.log(r)) for r in rhos), CLEAN], noise), iter(z)
        x = z[-1] * rhos[0] * grid[0].alpha
        draw: Callable[[Point, Point], Tensor] = lambda p, q, drawn=drawn: next(drawn)  # noqa: E731
        results.append(sample(name, grid, x, MIXTURE, noise=draw, **options)[0])
    for other in results[1:]:
        assert (results[0] - other).abs().max() < 1e-8


@pytest.mark.parametrize("name", ALL)
def test_predictions_agree(name: str) -> None:
    """The samples are the same whether the network predicts ε, x0, v or the flow."""
    grid = karras(8)
    x = from_prior(SD, MIXTURE, 24)
    results = [
        sample(name, grid, x, MIXTURE, prediction, draws)[0]
        for prediction in ("epsilon", "sample", "v_prediction", "flow_prediction")
    ]
    for other in results[1:]:
        assert (results[0] - other).abs().max() < 1e-8


# Counting


@pytest.mark.parametrize("name", LISTED)
def test_evaluations_are_counted(name: str) -> None:
    for n in (1, 2, 3, 7, 30):
        grid = karras(n)
        points = len(evaluation_points(SOLVERS[name].function, grid))
        assert sample(name, grid, from_prior(SD, MIXTURE, 24), MIXTURE, noise=draws)[1] == points
        if name == "pndm":
            assert points == (1 if n == 1 else n + 1)
        elif name != "restart":
            per = SOLVERS[name].evaluations_per_step
            expected = per * (n - 1) + 1 if name != "heunpp2" else [1, 3][n - 1] if n < 3 else 3 * n - 3
            assert points == expected


@pytest.mark.parametrize("schedule", [SD, ZERO_SNR, NoiseSchedule.flow(), NoiseSchedule.edm()])
@pytest.mark.parametrize("name", [n for n in TWO if n != "restart"])
def test_steps_of_two_evaluations_lie_regularly(name: str, schedule: NoiseSchedule) -> None:
    """Evaluation 2·i begins step i, also from α = 0: diffusers' image-to-image relies on it."""
    function, grid = SOLVERS[name].function, karras(5, schedule)
    points = evaluation_points(function, grid)
    begun = [matching_rest(function, grid, points[i:]) for i in range(len(points))]
    assert [rest and rest.points for rest in begun] == [grid.points[i // 2 :] if i % 2 == 0 else None for i in range(9)]


def test_restart_goes_back_up() -> None:
    """From σ/α ≤ `low` to `high` and down again over the grid's own points, by two evaluations each."""
    grid = karras(20)
    inside = [p for p in grid.points if 0.1 <= p.rho <= 2.0]
    for times in (0, 1, 3):
        points = evaluation_points(lambda *a: SOLVERS["restart"].function(*a, times=times), grid)  # noqa: B023
        assert len(points) == 39 + times * 2 * (len(inside) - 1)
        assert points.count(inside[0]) == 2 + times
    assert len(evaluation_points(lambda *a: SOLVERS["restart"].function(*a, low=3.0, high=2.0), grid)) == 39


# Starting mid-way, edits, ends


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_start_midway_is_the_rest_of_the_run(name: str) -> None:
    grid = karras(10)
    per = SOLVERS[name].evaluations_per_step
    whole = states(name, grid)
    rest, _ = sample(name, grid[4:], whole[4 * per], MIXTURE, noise=draws)
    assert (rest - whole[-1]).abs().max() < 1e-10


@pytest.mark.parametrize(
    "name", [n for n in LISTED if not SOLVERS[n].stochastic and n not in ONE_STEP and SOLVERS[n].order > 1]
)
def test_a_start_midway_from_the_exact_state_is_accurate(name: str) -> None:
    """A multistep solver restarts without history."""
    grid = karras(40)
    x = MIXTURE.solve(from_prior(SD, MIXTURE, 24), grid[0], grid[15])
    exact = MIXTURE.denoise(MIXTURE.solve(x, grid[15], grid[-2]), grid[-2].alpha, grid[-2].sigma)[0]
    result, _ = sample(name, grid[15:], x, MIXTURE)
    first_order, _ = sample("euler", grid[15:], x, MIXTURE)
    assert (result - exact).norm(dim=1).median() < 0.25 * (first_order - exact).norm(dim=1).median()


@pytest.mark.parametrize("name", LISTED)
def test_edits_between_steps_are_honoured(name: str) -> None:
    """A state replaced halfway: the run continues from the new one, the last evaluation from the last edit."""
    grid = karras(40)
    function = SOLVERS[name].function
    halfway = len(evaluation_points(function, grid)) - len(evaluation_points(function, grid[20:]))
    x, other = from_prior(SD, MIXTURE, 48)[:24], from_prior(SD, MIXTURE, 48)[24:]
    results = []
    for start in (x, -x):
        count = 0

        def denoise(state: Tensor, p: Point) -> Denoised:
            nonlocal count
            if count == halfway:
                state = MIXTURE.solve(other, grid[0], p)
            count += 1
            return Denoised(state, MIXTURE.denoise(state, p.alpha, p.sigma)[0], p, "sample")

        results.append(run(SOLVERS[name].function(start, grid, draws), denoise)[0])
    apart = (results[0] - results[1]).norm(dim=1).median()
    bound = 0.26 if name.startswith("gradient_estimation") else 0.25  # γ = 2 gives the step before twice the weight
    assert apart < bound, "what was before the edit shows"

    def last(state: Tensor, p: Point) -> Denoised:
        state = other if p is grid[-2] else state
        return Denoised(state, MIXTURE.denoise(state, p.alpha, p.sigma)[0], p, "sample")

    if name != "lcm":  # its x0 at t = 0 is the state
        expected = MIXTURE.denoise(other, grid[-2].alpha, grid[-2].sigma)[0]
        assert (run(SOLVERS[name].function(x, grid, draws), last)[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", FORWARD)
def test_the_last_step_is_x0_without_noise(name: str) -> None:
    for noise in (SD, NoiseSchedule.flow(), NoiseSchedule.edm()):
        for n in (1, 2, 9):
            drawn: list[Point] = []
            answers: list[Tensor] = []

            def draw(p: Point, q: Point, drawn: list[Point] = drawn) -> Tensor:
                drawn.append(q)
                return torch.ones(24, 4, dtype=torch.float64)

            def denoise(x: Tensor, p: Point, answers: list[Tensor] = answers) -> Denoised:
                answers.append(MIXTURE.denoise(x, p.alpha, p.sigma)[0])
                return Denoised(x, answers[-1], p, "sample")

            grid = grids.build("trailing", noise, n)  # which does not end at t = 0, where lcm's answer is the state
            result = run(SOLVERS[name].function(from_prior(noise, MIXTURE, 24), grid, draw), denoise)[0]
            assert (result - answers[-1]).abs().max() < (1e-3 if name == "lcm" else 1e-15)
            assert all(q.sigma != 0 for q in drawn)
            assert SOLVERS[name].stochastic or not drawn


ENDS = [
    (SD, "epsilon"),
    (ZERO_SNR, "v_prediction"),
    (NoiseSchedule.flow(), "flow_prediction"),
    (NoiseSchedule.edm(), "epsilon"),
]


@pytest.mark.parametrize("name", ALL)
def test_from_pure_noise_to_the_picture(name: str) -> None:
    """Finite from α = 0 to σ = 0, with any number of steps."""
    for noise, prediction in [*ENDS, (ZERO_SNR, "sample"), (NoiseSchedule.flow(shift=3.0), "v_prediction")]:
        x = from_prior(noise, MIXTURE, 24)
        if SOLVERS[name].upwards:
            x = MIXTURE.draw(24, torch.Generator().manual_seed(0))
        for grid in ("karras", "trailing"):
            for n in (1, 2, 3, 5, 20):
                result, _ = sample(name, grids.build(grid, noise, n), x, MIXTURE, prediction, draws)
                assert result.isfinite().all(), (noise, grid, n)


@cache
def start_and_answer(noise: NoiseSchedule, grid: str) -> tuple[Grid, Tensor, Tensor]:
    points = grids.build(grid, noise, 20)
    x = from_prior(noise, MIXTURE, 24)
    return points, x, answer(points[0], points[-2], x, MIXTURE)


@pytest.mark.parametrize("name", [n for n in LISTED if not SOLVERS[n].stochastic])
def test_twenty_steps_from_pure_noise_come_near(name: str) -> None:
    for noise, prediction in ENDS:
        grid, x, exact = start_and_answer(noise, "trailing" if noise.name == "flow" else "karras")
        result, _ = sample(name, grid, x, MIXTURE, prediction)
        assert (result - exact).norm(dim=1).median() < 0.5, noise


# Precision and speed


@pytest.mark.parametrize("name", [n for n in LISTED if not SOLVERS[n].stochastic])
def test_float32_is_enough(name: str) -> None:
    """The native run with its float32 state against the same run in float64."""
    for noise, prediction in ENDS:
        s = schedulers.get(name, noise=noise, prediction=prediction, grid="karras")
        x = from_prior(noise, MIXTURE, 8)
        exact, _ = sample(name, s.grid(20), x, MIXTURE, prediction)
        network = MIXTURE.denoiser(noise, prediction)
        pair = (lambda x, t: (network(x, t),) * 2) if s.solver.cfg_pp else network  # noqa: B023
        result = s.sample(pair, x.float(), 20)
        assert (result - exact).abs().max() / exact.abs().max() < 1e-4


@pytest.mark.parametrize("name", LISTED)
def test_nothing_is_read_back_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .item(), .cpu(), bool of a tensor, … between the first and the last evaluation."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("a tensor was read back")

    grid, x = karras(9), from_prior(SD, MIXTURE, 24)
    z = draws(grid[0], grid[1])
    steps = SOLVERS[name].function(x, grid, lambda p, q: z)
    for what in ("item", "cpu", "tolist", "numpy", "to", "__bool__", "__float__", "__int__", "__iter__", "__array__"):
        monkeypatch.setattr(Tensor, what, forbidden)
    run(steps, lambda x, p: Denoised(x, x * 0.9, p, "epsilon"))


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("noise", [SD, NoiseSchedule.flow(), NoiseSchedule.edm()])
def test_times_carry_gradients(name: str, noise: NoiseSchedule) -> None:
    """Points of 0-d tensors give the numbers of points of floats, and the derivative by a time (for tuned grids)."""
    prediction = "flow_prediction" if noise.name == "flow" else "epsilon"
    start, x = karras(6, noise), from_prior(noise, MIXTURE, 4)
    z = torch.full((4, 4), 0.1, dtype=torch.float64)

    def loss(times: list[Any]) -> Any:
        grid = Grid([start[0], *(noise.at(t=t) for t in times), CLEAN], noise)
        return sample(name, grid, x, MIXTURE, prediction, lambda p, q: z)[0].square().sum()

    times = [p.t for p in start.points[1:-1]]
    tensors = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in times]
    value = loss(tensors)
    value.backward()
    assert value.item() == pytest.approx(loss(times).item(), rel=1e-9)
    h = 1e-4 * abs(times[2])
    change = loss([*times[:2], times[2] + h, *times[3:]]) - loss([*times[:2], times[2] - h, *times[3:]])
    slope = (change / (2 * h)).item()
    gradient = tensors[2].grad
    assert gradient is not None
    assert gradient.item() == pytest.approx(slope, rel=2e-3, abs=1e-5)


# Options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deis", {"order": 5}),
        ("deis", {"order": 2.5}),
        ("deis", {"order": True}),
        ("unipc", {"variant": "bh3"}),
        ("ddpm", {"variance": "learned_range"}),
        ("euler", {"eta": -0.1}),
        ("euler", {"eta": math.nan}),
        ("euler", {"eta": math.inf}),
        ("euler", {"eta": "1"}),
        ("restart", {"times": 1.5}),
        ("dpm_adaptive", {"order": 1}),
    ],
)
def test_values_that_an_option_cannot_take(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name}: {next(iter(options))} = .* allowed: "):
        SOLVERS[name].check(options)


def test_defaults() -> None:
    for s in SOLVERS.values():
        s.check(s.options)
        assert s.function.__doc__
        assert s.reference
    assert [SOLVERS[n].options["order"] for n in ("deis", "lms", "unipc")] == [3, 4, 2]
    assert SOLVERS["unipc"].options["variant"] == "bh2"
    assert SOLVERS["dpmpp_3m"].order == 3


def test_adaptive_steps_end_with_a_broken_network() -> None:
    """The search ends if the network's output is not a number."""
    broken = lambda x, p: Denoised(x, target("epsilon", p, x * math.nan, x * math.nan), p, "epsilon")  # noqa: E731
    grid = karras(5)
    result, nfe = run(SOLVERS["dpm_adaptive"].function(from_prior(SD, MIXTURE, 24), grid, draws), broken)
    assert result.isnan().all()
    assert nfe < 20
    with pytest.raises(ValueError, match="not known before"):
        evaluation_points(SOLVERS["dpm_adaptive"].function, grid)
