"""Grids: rules for all of them, the definition of each, and lists and files."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st

import schedulers
from schedulers import NoiseSchedule, Point, explicit, tuned
from schedulers.exact import Mixture
from schedulers.grids import GRIDS, beta_quantile, build, describe

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "laplace": NoiseSchedule.laplace(),
    "zero_snr": NoiseSchedule.scaled_linear().zero_terminal_snr(),
    "flow": NoiseSchedule.flow(),
    "flow_shift": NoiseSchedule.flow(6.0),
    "edm": NoiseSchedule.edm(),
}
RAMPS = (
    "karras",
    "exponential",
    "polyexponential",
    "beta_t",
    "beta_sigma",
    "kl_optimal",
    "laplace",
    "ays_11",
    "ays_32",
)
SD = SCHEDULES["scaled_linear"]


def times(name: Any, n: int, noise: NoiseSchedule = SD) -> list[float]:
    return [p.t for p in build(name, noise, n).points[:-1]]


def levels(name: Any, n: int, noise: NoiseSchedule = SD) -> list[float]:
    return [p.sigma if noise.name == "flow" else p.rho for p in build(name, noise, n).points]


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=60, deadline=None)
@given(schedule=st.sampled_from(sorted(SCHEDULES)), n=st.one_of(st.integers(1, 30), st.integers(1, 1000)))
def test_every_grid_of_every_length(name: str, schedule: str, n: int) -> None:
    noise = SCHEDULES[schedule]
    grid = build(name, noise, n)
    assert len(grid) == n + 1
    assert grid[-1] == Point(0.0, 1.0, 0.0)
    angles = [math.atan2(p.sigma, p.alpha) for p in grid.points]
    assert all(a > b for a, b in pairwise(angles))
    for p in grid.points[:-1]:
        again = noise.at(t=p.t)
        assert (p.alpha, p.sigma) == pytest.approx((again.alpha, again.sigma), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends(name: str, schedule: str) -> None:
    noise = SCHEDULES[schedule]
    if name != "leading":  # all but leading ask at the most noise first
        assert build(name, noise, 7)[0] == noise.noisiest
        assert build(name, noise, 1).points == [noise.noisiest, Point(0.0, 1.0, 0.0)]
    if name in (*RAMPS, "linspace"):
        assert build(name, noise, 7)[-2].t == pytest.approx(noise.t_min, abs=1e-9)
        assert build(name, noise, 7)[-2].sigma == pytest.approx(noise.sigma(noise.t_min), rel=1e-12)


def test_where_a_table_ends_in_noise_the_ramp_begins_one_below() -> None:
    noise = SCHEDULES["zero_snr"]
    points = build("karras", noise, 8).points
    assert (points[0].t, points[0].alpha, points[1].t) == (999, 0, 998)
    inner = [p.rho ** (1 / 7) for p in points[1:-1]]
    gaps = [a - b for a, b in pairwise(inner)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-6)


# Each one's definition


def test_uniform_in_time() -> None:
    assert times("trailing", 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert times("leading", 10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert times("linspace", 10) == pytest.approx([999, 888, 777, 666, 555, 444, 333, 222, 111, 0], abs=1e-9)
    assert times("sgm_uniform", 10) == pytest.approx([99.9 * k for k in range(10, 0, -1)])
    assert times("simple", 3) == [999, 666, 333]
    assert times("trailing", 3) == pytest.approx([999, 2000 / 3 - 1, 1000 / 3 - 1])
    for name in ("trailing", "linspace", "leading", "simple"):
        assert times(name, 1000) == pytest.approx(list(range(999, -1, -1)), abs=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 5, 8, 10, 50])
def test_spacings_are_diffusers(spacing: str, n: int) -> None:
    if (spacing, n) == ("linspace", 1):  # np.linspace(0, 999, 1) is 0 there: one step from hardly any noise
        assert times(spacing, n) == [999]
        return
    theirs = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(n)
    assert times(spacing, n) == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", ["karras", "exponential", "beta_sigma"])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_ramps_are_diffusers(name: str, n: int) -> None:
    if name == "beta_sigma":
        pytest.importorskip("scipy")
    flag = {f"use_{name.removesuffix('_sigma')}_sigmas": True}
    theirs = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="linspace", **flag
    )
    theirs.set_timesteps(n)
    assert levels(name, n) == pytest.approx(theirs.sigmas.tolist(), rel=1e-4)
    assert times(name, n) == pytest.approx(theirs.timesteps.tolist(), abs=0.02)


def test_polyexponential_bends() -> None:
    assert times("polyexponential", 9) == times("exponential", 9)
    big, small = SD.noisiest.rho, SD.at(t=0).rho
    bent = levels(lambda noise, n: GRIDS["polyexponential"](noise, n, rho=2.0), 5)
    assert bent[:-1] == pytest.approx([small * (big / small) ** ((1 - k / 4) ** 2) for k in range(5)])


def test_kl_optimal() -> None:
    expected = [14.6, 4.57, 2.63, 1.79, 1.30, 0.96, 0.71, 0.51, 0.34, 0.18, 0.029, 0]  # as its authors' formula gives
    assert levels("kl_optimal", 11) == pytest.approx(expected, abs=0.015)


def test_beta_quantiles() -> None:
    assert [beta_quantile(u) for u in (0.05, 0.2, 0.4)] == pytest.approx(BETA_06, abs=1e-9)
    assert beta_quantile(0.5) == pytest.approx(0.5, abs=1e-14)
    assert [beta_quantile(u) + beta_quantile(1 - u) for u in (0.0, 1e-9, 0.3)] == pytest.approx([1, 1, 1])


def test_skewed_beta_quantiles() -> None:
    """By numerical integration of the density xᵃ⁻¹(1 − x)ᵇ⁻¹, after x = y^(1/a) removes the pole at 0."""
    a, b = 0.5, 0.7
    scale = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    for u in (0.03, 0.2, 0.5, 0.8, 0.97):
        x, steps = beta_quantile(u, a, b), 20_000
        width = x**a / steps
        area = sum((1 - ((i + 0.5) * width) ** (1 / a)) ** (b - 1) for i in range(steps)) * width / a
        assert area / scale == pytest.approx(u, abs=1e-6)
        assert beta_quantile(1 - u, b, a) == pytest.approx(1 - x, abs=1e-12)


BETA_06 = [0.0125544569, 0.1229217505, 0.3627009908]  # scipy.stats.beta.ppf(u, 0.6, 0.6)


@pytest.mark.parametrize(("name", "listed"), [("ays", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")])
def test_ays_are_the_authors_lists(name: str, listed: str) -> None:
    assert times(name, 10) == pytest.approx(AysSchedules[f"{listed}Timesteps"], abs=1e-6)
    assert levels(name, 10) == pytest.approx(AysSchedules[f"{listed}Sigmas"], rel=0.02)


def test_ays_of_video_and_other_lengths() -> None:
    video = NoiseSchedule.edm(0.002, 700.0)
    assert levels("ays_svd", 10, video) == pytest.approx(AysSchedules["StableDiffusionVideoSigmas"], rel=1e-9)
    ten, twenty = levels("ays", 10), levels("ays", 20)
    assert twenty[::2] == pytest.approx(ten)
    assert twenty[1] == pytest.approx(math.sqrt(ten[0] * ten[1]))


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("ays_11", [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]),
        ("ays_11_sdxl", [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]),
        ("ays_gits", [14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029]),
        ("ays_gits_sdxl", [14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029]),
    ],
)
def test_lists_of_forge(name: str, listed: list[float]) -> None:
    """Every level is a step; two steps are the ends, 21 halve each interval of ln σ."""
    levels_11, levels_21 = levels(name, 11), levels(name, 21)
    assert levels_11 == pytest.approx([*listed, 0], rel=0.02)
    assert levels(name, 2)[:2] == pytest.approx([SD.noisiest.rho, SD.at(t=0).rho])
    assert levels_21[:21:2] == pytest.approx(levels_11[:11])
    assert levels_21[1] == pytest.approx(math.sqrt(levels_11[0] * levels_11[1]))


@pytest.mark.parametrize(("name", "third"), [("ays_32", 8.643630810), ("ays_32_sdxl", 8.505221270)])
def test_the_longest_list_of_forge(name: str, third: float) -> None:
    """On a schedule with its range, it is the list; elsewhere ln σ is stretched to the schedule's range."""
    wide = levels(name, 32, NoiseSchedule.edm(0.015, 14.615))
    assert (wide[0], wide[2], wide[31]) == pytest.approx((14.615, third, 0.015), rel=1e-6)
    stretch = math.log(SD.noisiest.rho / SD.at(t=0).rho) / math.log(14.615 / 0.015)
    narrow = levels(name, 32)
    assert narrow[2] == pytest.approx(SD.at(t=0).rho * (third / 0.015) ** stretch, rel=1e-6)


def test_gits_are_the_authors_lists() -> None:
    five = [14.61464119, 2.84484982, 1.24153244, 0.59516323, 0.25053367]
    ten = [14.61464119, 5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381, 0.32104823, 0.19894916]
    twenty = [14.61464119, 7.49001646, 4.65472794, 3.07277966, 2.19988537, 1.61558151, 1.24153244, 0.95350921]
    assert levels("gits", 5)[:5] == pytest.approx(five, rel=1e-5)
    assert levels("gits", 10)[:9] == pytest.approx(ten, rel=1e-5)
    assert levels("gits", 20)[:8] == pytest.approx(twenty, rel=1e-5)
    assert levels("gits", 40)[:16:2] == pytest.approx(twenty, rel=1e-5)
    assert levels("gits", 2)[:2] == pytest.approx([14.61464119, 0.803307], rel=1e-5)


def test_laplace() -> None:
    """Quantiles of Laplace(0, 1/2) in ln σ, symmetric around 1; the outermost two are the schedule's ends."""
    inner = levels("laplace", 9)[1:-2]
    assert inner[3] == pytest.approx(1.0)
    assert [a * b for a, b in zip(inner, reversed(inner), strict=True)] == pytest.approx([1.0] * 7)
    assert inner[0] == pytest.approx(math.exp(-0.5 * math.log(2 / 8)))  # 1 − 2·|½ − 1/8| = 2/8
    assert levels("laplace:1", 9)[1] == pytest.approx(4.0)
    many = levels("laplace", 800)  # here the outer quantiles lie beyond the schedule
    first, last = 1 / (2 * many[0] ** 2), 1 - many[799] ** 2 / 2
    assert many[1] == pytest.approx((2 * (first + (last - first) / 799)) ** -0.5)


def test_smoothstep() -> None:
    assert times("smoothstep", 4) == pytest.approx([999, 999 * 27 / 32, 499.5, 999 * 5 / 32])


def test_beta57() -> None:
    """Begins at the most noise, and its k-th time is the quantile of 1 − k/n."""
    assert times("beta57", 5) == pytest.approx([999 * beta_quantile(1 - k / 5, 0.5, 0.7) for k in range(5)])
    assert times("beta57", 5)[0] == 999


def test_bong_tangent() -> None:
    """Half of the largest level at step ⌊0.6·(n + 2)⌋ − 1, and the slope of an arctangent from there on."""
    flow = levels("bong_tangent", 8, SCHEDULES["flow"])
    assert (flow[0], flow[5]) == pytest.approx((1.0, 0.5))
    ratio = (flow[5] - flow[6]) / (flow[5] - flow[7])
    assert ratio == pytest.approx(math.atan(0.8) / math.atan(1.6))
    scaled = [math.atan(0.8 * (6 - k)) for k in range(6)]
    assert (flow[1] - flow[2]) / (flow[0] - flow[5]) == pytest.approx((scaled[1] - scaled[2]) / (scaled[0] - scaled[5]))
    assert levels("bong_tangent", 8) == pytest.approx([s * SD.noisiest.rho for s in flow])


def test_every_grid_has_a_formula_and_a_source() -> None:
    for name in GRIDS:
        info = describe(name)
        assert info.about
        assert info.formula
        assert info.reference
        assert all(schedulers.check_grid(alias) == name for alias in info.aliases)


def test_linear_quadratic() -> None:
    """Mochi's: linear to 1 − 0.025 in half of the steps, then a parabola to 0 with the same slope at the joint."""
    flow = levels("linear_quadratic", 8, SCHEDULES["flow"])
    assert flow[:5] == pytest.approx([1 - 0.025 * k / 4 for k in range(5)])
    second = [flow[k] - 2 * flow[k + 1] + flow[k + 2] for k in range(4, 7)]
    assert second == pytest.approx([second[0]] * 3)
    assert flow[4] - flow[5] == pytest.approx(0.025 / 4 - second[0] / 2)
    assert levels("linear_quadratic", 8) == pytest.approx([s * SD.noisiest.rho for s in flow])


@pytest.mark.parametrize("n", [1, 4, 28])
def test_flow_grids_are_diffusers(n: int) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1 - k / n for k in range(n)])
    assert times("trailing", n, NoiseSchedule.flow(3.0)) == pytest.approx(theirs.timesteps.tolist(), rel=1e-5)
    assert levels("trailing", n, NoiseSchedule.flow(3.0)) == pytest.approx(theirs.sigmas.tolist(), rel=1e-5)


# What cannot be


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "5", None])
def test_steps_that_are_none(n: Any) -> None:
    with pytest.raises(ValueError, match=f"steps must be a whole number, at least 1; got {n!r}"):
        build("karras", SD, n)


@pytest.mark.parametrize("name", ["leading", "simple", "trailing"])
def test_more_steps_than_times(name: str) -> None:
    with pytest.raises(ValueError, match="1001 steps are too many"):
        build(name, SD, 1001)
    assert len(build("karras", SD, 1001)) == 1002


def test_a_table_of_one_level_has_one_step() -> None:
    noise = NoiseSchedule.from_betas([0.5])
    assert len(build("karras", noise, 1)) == 2
    with pytest.raises(ValueError, match="2 steps are too many"):
        build("karras", noise, 2)


def test_a_grid_that_is_none() -> None:
    with pytest.raises(ValueError, match="gave 1 points for 2 steps"):
        build(lambda noise, n: [noise.noisiest], SD, 2)


# Given


@pytest.mark.parametrize("kind", [tuple, torch.tensor, np.array])
def test_lists_of_any_kind(kind: Any) -> None:
    assert [p.t for p in schedulers.get("euler", grid=kind([900.0, 500.0])).grid()] == [900, 500, 0]


def test_a_list_of_nothing_is_no_default() -> None:
    for nothing, says in (([], "1 to 10000 numbers"), ("", "unknown grid")):
        with pytest.raises(ValueError, match=says):
            schedulers.get("euler", grid=nothing)


def test_explicit_times_and_levels() -> None:
    s = schedulers.get("euler", grid=[999, 500, 20.5])
    assert (s.grid_name, s.nfe(3)) == ("explicit", 3)
    assert [p.t for p in s.grid().points] == [999, 500, 20.5, 0]
    ays = schedulers.get("euler", grid=explicit(sigmas=AysSchedules["StableDiffusionSigmas"]))  # 14.615 is just outside
    assert [p.t for p in ays.grid().points][:-1] == pytest.approx(AysSchedules["StableDiffusionTimesteps"], abs=0.6)
    flow = build(explicit(sigmas=(1.0, 0.5)), NoiseSchedule.flow(3.0), 2)
    assert [(p.t, p.sigma) for p in flow.points] == [(1000, 1), (500, 0.5), (0, 0)]
    grid = build(explicit(sigmas=[10, 1], model_times=[950, 400.5]), SD, 2)
    assert [p.t for p in grid.points] == [950, 400.5, 0]
    assert [p.rho for p in grid.points[:2]] == pytest.approx([10, 1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: explicit(), "either times or sigmas"),
        (lambda: explicit([1], [1]), "either times or sigmas"),
        (lambda: explicit([]), "1 to 10000 numbers"),
        (lambda: explicit([5, 5]), "must fall from entry to entry"),
        (lambda: explicit([5, float("nan")]), "finite numbers, got 'nan'"),
        (lambda: explicit(["5"]), "finite numbers, got '5'"),
        (lambda: explicit([5, 4], model_times=[5]), "1 model_times for 2 points"),
        (lambda: schedulers.get("euler", grid=[1200, 4]), r"t must lie in \[0, 999\], got 1200"),
        (lambda: schedulers.get("euler", grid=explicit(sigmas=[20.0])), r"σ/α must lie in \[0.02917, 14.61\], got 20"),
        (lambda: schedulers.get("euler", grid=[900, 4]).grid(3), "'explicit' has 2 steps, not 3"),
        (
            lambda: schedulers.get("euler", noise="flow", prediction="flow_prediction", grid=explicit(sigmas=[1.5])),
            r"\(0, 1\], got 1.5",
        ),
    ],
)
def test_lists_that_cannot_be(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def write(path: Path, **changes: Any) -> str:
    grid = {
        "schema": "diffgen.grid/1",
        "solver": "dpmpp_2m",
        "nfe": 3,
        "sigmas": [14.6, 2.0, 0.3],
        "notes": "for people",
    }
    path.write_text(json.dumps({k: v for k, v in (grid | changes).items() if v is not None}))
    return str(path)


def test_a_grid_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "tuned.json", model_times=[990.0, 600.0, 100.0])
    assert schedulers.check_grid(path) == path
    s = schedulers.get("dpmpp_2m", grid=path)
    assert (s.grid_name, s.nfe(3)) == ("tuned.json", 3)
    assert [p.t for p in s.grid().points] == [990, 600, 100, 0]
    assert [p.rho for p in s.grid().points] == pytest.approx([14.6, 2.0, 0.3, 0])
    with pytest.raises(ValueError, match=r"tuned.json was tuned for dpmpp_2m, not for euler"):
        schedulers.get("euler", grid=path)


def test_a_tuned_grid_is_interpolated_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "tuned.json", model_times=[990.0, 600.0, 100.0], corrections=[[0.1, 0.2]] * 3)
    s = schedulers.get("dpmpp_2m", grid=path)
    own = s.grid(3)
    for steps in (1, 2, 5, 9):
        grid = s.grid(steps)
        rho = [p.rho for p in grid.points[:-1]]
        assert len(rho) == steps
        assert rho == sorted(rho, reverse=True)
        assert not grid.corrections
        assert rho[0] == pytest.approx(own[0].rho)
        if steps > 1:
            assert rho[-1] == pytest.approx(own[2].rho)
            assert grid[steps - 1].t == pytest.approx(100.0)
    assert [p.rho for p in s.grid(5).points[:-1:2]] == pytest.approx([14.6, 2.0, 0.3], rel=1e-6)
    assert s.grid(5)[1].rho == pytest.approx((14.6 * 2.0) ** 0.5, rel=1e-6)  # ln σ is linear in between
    with pytest.warns(UserWarning, match=r"tuned\.json was tuned for 3 steps; it is interpolated to 8"):
        s.set_timesteps(8)
    assert s.steps_for(5) == 5
    fixed = schedulers.get("dpmpp_2m", grid=explicit(sigmas=[14.6, 2.0, 0.3]))
    with pytest.raises(ValueError, match="has 3 steps, not 8"):
        fixed.set_timesteps(8)


@pytest.mark.parametrize(
    ("gains", "rows"),
    [
        (None, [[0.5, 0.3], [0.2, 0.7], [-0.1, 0.15], [0.05, -0.2]]),
        ([0.02, -0.1, 0.04, 0.01], [[0.5], [0.2], [-0.1], [0.05]]),
        ([0.02, -0.1, 0.04, 0.01], None),
        (None, [[0.5, 0.3, 0.1, 9.0], [0.2, 0.7, 0.3, 9.0], [-0.1, 0.15, 0.2, 9.0], [0.05, -0.2, 0.3, 9.0]]),
    ],
)
def test_corrections_of_a_tuned_grid(gains: list[float] | None, rows: list[list[float]] | None, tmp_path: Path) -> None:
    """The correction adds g·x0 + c₁·(x0 − the one before) + c₂·(that − the one before it) + … to Euler's state."""
    sigmas = [10.0, 4.0, 1.0, 0.2]
    path = write(tmp_path / "g.json", solver="euler", nfe=4, sigmas=sigmas, gains=gains, corrections=rows)
    s = schedulers.get("euler", grid=path)
    network = Mixture.random(1).denoiser(s.noise)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    by_hand, past = x, []
    grid = s.grid(4)
    for i, (p, q) in enumerate(grid.pairs()):
        eps = network(by_hand, torch.full((5,), p.t))
        x0 = (by_hand - p.sigma * eps) / p.alpha
        past = [x0, *past]
        by_hand = q.alpha * x0 + q.sigma * eps + (gains[i] * x0 if gains else 0)
        for c, newer, older in zip(rows[i] if rows else (), past, past[1:], strict=False):
            by_hand = by_hand + c * (newer - older)
    assert torch.allclose(s.sample(network, x, 4), by_hand, atol=1e-5)
    s.set_timesteps(4)
    y = x
    for t in s.timesteps:
        y = s.step(network(y, t.expand(5)), t, y).prev_sample
    assert torch.allclose(y, by_hand, atol=1e-5)
    plain = schedulers.get("euler", grid=write(tmp_path / "z.json", solver="euler", sigmas=sigmas, nfe=4))
    zeros = {"gains": [0.0] * 4, "corrections": [[0.0, 0.0]] * 4}
    zero = write(tmp_path / "0.json", solver="euler", nfe=4, sigmas=sigmas, **zeros)
    assert torch.equal(schedulers.get("euler", grid=zero).sample(network, x, 4), plain.sample(network, x, 4))
    with pytest.raises(ValueError, match="one evaluation a step"):
        schedulers.get("heun", grid=write(tmp_path / "h.json", solver="heun", nfe=7, sigmas=sigmas, **zeros))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": "diffgen.grid/2"}, r'g.json: no grid: "schema" must be "diffgen.grid/1"'),
        ({"solver": None}, '"solver"'),
        ({"nfe": "3"}, '"nfe"'),
        ({"sigmas": None}, "either times or sigmas"),
        ({"times": [5]}, "either times or sigmas"),
        ({"sigmas": [1, 2]}, "must fall"),
        ({"sigmas": [1, None]}, "finite numbers"),
        ({"sigmas": {"a": 1}}, "list of 1 to"),
        ({"sigmas": list(range(20_000, 0, -1))}, "list of 1 to"),
        ({"model_times": [1, 2]}, "2 model_times for 3"),
        ({"corrections": [[0, 0]]}, "must be 3 rows"),
        ({"corrections": [[0], [0], [0, 0]]}, "must be 3 rows of equally many"),
        ({"corrections": [[0] * 4] * 3}, "at most 3"),
        ({"corrections": [[], [], []]}, "list of 1 to"),
        ({"corrections": [1, 2, 3]}, "list of 1 to"),
        ({"gains": [1, 2]}, "must be 3 numbers"),
        ({"gains": [1, 2, None]}, "finite numbers"),
        ({"model_hash": 5}, "must be a text"),
        ({"guidance": "3"}, "must be a text"),
        ({"guidance": True}, "must be a text"),
        ({"guidance": 10**400}, "must be a text"),
        ({"guidance": float("nan")}, "must be a text"),
        ({"sigmas": [10**400, 2.0, 1.0]}, "finite numbers"),
        ({"notes": "x" * (1 << 20)}, "larger than 1048576 bytes"),
    ],
)
def test_files_that_are_no_grids(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        tuned(write(tmp_path / "g.json", **changes))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1, "schema": 2}', "[" * 100_000, "\xff", '{"a": NaN}'])
def test_files_that_are_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "g.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"g\.json: "):
        tuned(tmp_path / "g.json")
    with pytest.raises(FileNotFoundError):
        tuned(tmp_path / "none.json")
