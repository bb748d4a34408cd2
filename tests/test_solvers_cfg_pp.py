"""CFG++: closed form, published formulas, order, both loops, and what `generate` passes to the scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_runs import from_prior
from test_solvers_rules import draws, phi_1, phi_2
from torch import Tensor

import diffgen
import schedulers
from diffgen.diffusion import guided
from diffgen.errors import UsageError
from diffgen.models.find import find
from diffgen.pipelines.plan import make_plan
from diffgen.pipelines.sampling.denoiser import denoiser
from schedulers import NoiseSchedule, grids
from schedulers.exact import Mixture
from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.prediction import Denoised
from schedulers.solver import SOLVERS, run

NAMES = sorted(name for name, s in SOLVERS.items() if s.cfg_pp)
WITH, WITHOUT = Mixture.random(0), Mixture.random(1)  # the data of a prompt, and all data
VE = NoiseSchedule.edm()  # α = 1, the frame of k-diffusion and ComfyUI
SD = NoiseSchedule.scaled_linear()


def pair(x: Tensor, p: Point, scale: float) -> tuple[Tensor, Tensor]:
    """(the guided x0, x0 without the prompt)."""
    cond, uncond = (m.denoise(x, p.alpha, p.sigma)[0] for m in (WITH, WITHOUT))
    return uncond + scale * (cond - uncond), uncond


def sample(
    name: str, grid: Grid, scale: Callable[[Point], float], noise: Any = draws, **options: Any
) -> tuple[Tensor, Tensor]:
    """(the start, the result) of a solver with guidance of a scale that may depend on the point."""
    start = from_prior(grid.noise, WITHOUT, 24)

    def denoise(x: Tensor, p: Point) -> Denoised:
        guided_x0, uncond = pair(x, p, scale(p))
        return Denoised(x, guided_x0, p, "sample", without=uncond if SOLVERS[name].cfg_pp else None)

    return start, run(SOLVERS[name].function(start, grid, noise, **options), denoise)[0]


def test_the_solvers_of_comfyui_are_here() -> None:
    assert len(NAMES) == 7
    for name in ("Euler CFG++", "Euler a CFG++", "DPM++ 2M CFG++", "DPM++ 2S a CFG++", "DDIM CFG++", "euler_a_cfg_pp"):
        assert schedulers.info(name).cfg_pp


@pytest.mark.parametrize("noise", [SD, NoiseSchedule.flow(3.0)])
def test_a_step_is_one_of_plain_guidance_with_a_larger_scale(noise: NoiseSchedule) -> None:
    """CFG++, eq. 13: with the scale ω·(1 − ρ'/ρ) in each step, euler_cfg_pp is euler with the scale ω."""
    grid = grids.build("karras", noise, 12)
    after = {p.t: q for p, q in pairwise(grid.points)}
    plain = sample("euler", grid, lambda p: 3.0)[1]
    plus = sample("euler_cfg_pp", grid, lambda p: 3.0 * (1 - (after[p.t].rho / p.rho if p.alpha else 0.0)))[1]
    assert (plain - plus).abs().max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_published_formulas(name: str) -> None:
    """The formulas of ComfyUI in its frame, with D guided, U without the prompt, and the same noise."""
    grid, scale, old, last, lower = grids.build("karras", VE, 9), 0.7, None, None, None
    stochastic = SOLVERS[name].stochastic
    eta = 0.6 if stochastic else 0.0
    start = x = from_prior(VE, WITHOUT, 24)
    for p, q in grid.pairs():
        D, U = pair(x, p, scale)
        if q.sigma == 0:
            x = D
            break
        up = min(q.sigma, eta * math.sqrt(q.sigma**2 * (p.sigma**2 - q.sigma**2) / p.sigma**2))
        down = math.sqrt(q.sigma**2 - up**2)
        h = math.log(p.sigma / down)
        if name == "dpmpp_2m_cfg_pp":
            mix = 0.0 if old is None else -math.expm1(-h) * h / (2 * last) * (D - old)
            x = D - math.exp(-h) * U + mix + math.exp(-h) * x
        elif name == "dpmpp_2s_ancestral_cfg_pp":
            m = VE.at(lam=-math.log(p.sigma) + h / 2)
            middle = math.exp(-h / 2) * (x + D - U) - math.expm1(-h / 2) * D
            x = math.exp(-h) * (x + D - U) - math.expm1(-h) * pair(middle, m, scale)[0]
        elif name == "gradient_estimation_cfg_pp":
            d = (x - U) / p.sigma
            x = D + d * q.sigma + (0.0 if old is None else (2.0 - 1) * (d - old) * (q.sigma - p.sigma))
        elif name.startswith("res_multistep") and old is not None:
            c = math.log(lower / last) / h  # from the level before to the one that its step reached
            b = phi_2(-h) / c
            x = math.exp(-h) * (x + D - U) - (phi_1(-h) - b) * U - b * old
        else:
            x = D + (x - U) / p.sigma * down
        old, last, lower = U, p.sigma, down
        if name == "dpmpp_2m_cfg_pp":
            last = h
        if name == "gradient_estimation_cfg_pp":
            old = d
        x = x + up * draws(p, q)
    result = sample(name, grid, lambda p: scale, **({"eta": eta} if stochastic else {}))
    assert torch.equal(result[0], start)
    assert (result[1] - x).abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_without_guidance_it_is_the_solver_of_that_name(name: str) -> None:
    grid = grids.build("karras", SD, 8)
    plain, plus = (sample(n, grid, lambda p: 0.0)[1] for n in (name.removesuffix("_cfg_pp"), name))
    assert (plain - plus).abs().max() < 1e-10


@cache
def guided_solution() -> Tensor:
    """Of plain guidance with the scale 1.5."""
    fine = Grid(grids.build("exponential", SD, 201).points[:-1], SD)
    return sample("dpmpp_3m", fine, lambda p: 1.5)[1]


@pytest.mark.parametrize("name", [name for name in NAMES if not SOLVERS[name].stochastic])
def test_the_order_with_guidance_is_one(name: str) -> None:
    """Of the ODE of plain guidance with the scale ω, by the scale ω·(1 − ρ'/ρ) in each step."""
    errors = []
    for steps in (20, 80):
        points = grids.build("exponential", SD, steps + 1).points[:-1]
        scales = {p.t: 1.5 * (1 - q.rho / p.rho) for p, q in pairwise(points)}
        result = sample(name, Grid(points, SD), lambda p: scales[p.t])[1]  # noqa: B023
        errors.append(float((result - guided_solution()).abs().max()))
    assert 0.6 < math.log(errors[0] / errors[1]) / math.log(4) < 1.4


# Both loops


def network(x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
    return torch.tanh(x) * 0.5, torch.sin(x) * 0.4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", ["scaled_linear", "flow"])
def test_the_loop_of_a_pipeline_gives_what_the_native_one_gives(name: str, noise: str) -> None:
    prediction = "flow_prediction" if noise == "flow" else "epsilon"
    for clip in (False, 1.5):
        s = schedulers.get(name, noise=noise, prediction=prediction, clip_sample=clip)
        s.set_timesteps(7)
        start = x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * s.init_noise_sigma
        generator = torch.Generator().manual_seed(1)
        for t in s.timesteps:
            output, without = network(x, t)
            x = s.step(output, t, x, generator=generator, without=without).prev_sample
        native = s.sample(network, start, 7, torch.Generator().manual_seed(1))
        torch.testing.assert_close(x, native, rtol=1e-4, atol=1e-4)
        for begin in range(len(s.timesteps)):
            s.set_begin_index(begin)
            x = start
            for t in s.timesteps[begin:]:
                output, without = network(x, t)
                x = s.step(output, t, x, generator=generator, without=without).prev_sample
            assert x.isfinite().all()


def test_a_missing_output_is_an_error() -> None:
    s = schedulers.get("euler_cfg_pp")
    with pytest.raises(ValueError, match="needs the network's output without the prompt too"):
        s.sample(lambda x, t: x, torch.zeros(1, 2), 3)
    s.set_timesteps(3)
    with pytest.raises(ValueError, match="needs the network's output without the prompt too"):
        s.step(torch.zeros(1, 2), s.timesteps[0], torch.zeros(1, 2))


def test_guided_gives_both_outputs() -> None:
    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x * c[:, None]

    x, c, none = torch.ones(2, 1), torch.tensor([2.0, 3.0]), torch.zeros(2)
    output, without = guided(model, c, none, 0.5, pair=True)(x, torch.zeros(2))
    assert output.flatten().tolist() == [1.0, 1.5]
    assert without.flatten().tolist() == [0.0, 0.0]
    output, without = guided(model, c, none, 0.5, pair=True, interval=(5.0, 9.0))(x, torch.tensor([1.0, 6.0]))
    assert output.flatten().tolist() == [2.0, 1.5]
    assert without.flatten().tolist() == [2.0, 0.0]


# generate


@pytest.mark.parametrize("family", ["sd1", "sd3", "z-image"])
def test_generate_is_the_native_loop_on_both_outputs(family: str, family_folder: Callable[[str], Path]) -> None:
    """In diffusers' pipelines and in our own loop. Outside the interval of guidance it is the plain solver."""
    generator = diffgen.load(str(family_folder(family)), device="cpu")

    def predicted(scheduler: str, guidance: float, **options: Any) -> list[Tensor]:
        states: list[Tensor] = []
        options |= {"negative": "blue", "seed": 5, "size": 32, "steps": 3}
        plan = make_plan(generator.model, "a red apple", scheduler=scheduler, guidance=guidance, **options)
        list(generator.pictures(plan, None, lambda shots, i, x0: states.append(x0.float().clone())))
        return states

    ours = predicted("euler_cfg_pp", 0.6)
    networks = [
        denoiser(generator.pipeline, generator.checked, ["a red apple"], guidance, (32, 32), "blue")
        for guidance in (0.6, 0.0)
    ]
    plan = make_plan(generator.model, "a red apple", scheduler="euler_cfg_pp", guidance=0.6, size=32)
    s = generator.scheduler(plan, (32, 32))
    noise = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(5))
    expected: list[Tensor] = []
    with torch.inference_mode():
        s.sample(
            lambda x, t: (networks[0](x, t), networks[1](x, t)),
            s.start(noise, 3),
            3,
            callback=lambda i, p, d: expected.append(d.x0),
        )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (ours[-1] - predicted("euler", 0.6)[-1]).abs().max() > 1e-3
    off = {"guidance_interval": (0.99, 1.0)}
    for a, b in zip(predicted("euler_cfg_pp", 5.0, **off), predicted("euler", 1.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "text"),
    [
        ("sd1", {"guidance": 1}, "needs guidance, and --guidance 1 is off"),
        ("flux", {"guidance": 3.5}, "this model takes it as an input"),
        ("unconditional", {}, "reads no prompts"),
    ],
)
def test_refusals(family: str, options: dict[str, Any], text: str, family_folder: Callable[[str], Path]) -> None:
    model = find(str(family_folder(family)))
    prompts = () if family == "unconditional" else "a red apple"
    with pytest.raises(UsageError, match=text):
        make_plan(model, prompts, scheduler="euler_cfg_pp", **options)


def test_a_large_scale_gets_a_note(family_folder: Callable[[str], Path]) -> None:
    model = find(str(family_folder("sd1")))
    notes = {g: make_plan(model, "a", scheduler="euler_cfg_pp", guidance=g).notes for g in (0.6, 7.5)}
    assert not notes[0.6]
    assert "guides far more" in notes[7.5][0]


def test_it_is_not_compared_with_a_solution() -> None:
    with pytest.raises(UsageError, match="guides more in more steps"):
        diffgen.compare(model="mixture", schedulers=["euler_cfg_pp"], out="x")
