"""The recommended scheduler fits its budget and has little error on mixtures that the choice did not use."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import schedulers
from schedulers import NoiseSchedule
from schedulers.exact import Exam, Gaussian, Mixture
from schedulers.grids import GRIDS, build
from schedulers.solver import SOLVERS

ROOT = Path(__file__).parent.parent
NOISES = {
    "scaled_linear": (NoiseSchedule.scaled_linear(), "epsilon"),
    "linear": (NoiseSchedule.linear(), "epsilon"),
    "edm": (NoiseSchedule.edm(), "epsilon"),
    "cosine": (NoiseSchedule.cosine(), "v_prediction"),
    "flow": (NoiseSchedule.flow(shift=3.0), "flow_prediction"),
    "pure noise": (NoiseSchedule.scaled_linear().zero_terminal_snr(), "v_prediction"),
}


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean(errors: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, errors)) / len(errors))


@pytest.fixture(scope="module")
def unseen() -> Exam:
    """Eight mixtures that the search did not use."""
    return Exam([Mixture.random(seed) for seed in range(300, 308)], NoiseSchedule.scaled_linear(), starts=48)


@pytest.mark.parametrize("noise", NOISES)
def test_it_uses_the_whole_budget(noise: str) -> None:
    schedule, prediction = NOISES[noise]
    for nfe in (*range(1, 22), 40, 80, 250):
        s = schedulers.recommend(nfe, noise=schedule, prediction=prediction)
        assert s.nfe(s.steps_for(nfe)) == nfe
        assert not s.solver.stochastic
        assert s.noise == schedule


@pytest.mark.parametrize("noise", NOISES)
def test_it_is_better_than_the_common_choice(noise: str) -> None:
    """Compared with dpmpp_2m and heun on their own grids and on trailing, on any schedule, from six evaluations on."""
    schedule, prediction = NOISES[noise]
    exam = Exam([Mixture.random(seed) for seed in range(300, 304)], schedule, prediction, starts=32)
    for nfe in (6, 8, 16, 40):
        candidates = [schedulers.recommend(nfe, noise=schedule, prediction=prediction)]
        for name in ("dpmpp_2m", "heun"):
            candidates += [
                schedulers.get(name, noise=schedule, prediction=prediction, grid=grid) for grid in (None, "trailing")
            ]
        errors = [mean(exam.errors(s.sample(exam.network, exam.x, s.steps_for(nfe)))) for s in candidates]
        assert errors[0] < min(errors[1:]), (nfe, errors)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_against_the_best_of_diffusers(unseen: Exam) -> None:
    """Compared with the best configurations of `benchmarks/error_per_nfe.py`: no ratio above 1.1, mean below 0.9."""
    benchmark = script("benchmarks/error_per_nfe.py")
    karras: dict[str, Any] = {"use_karras_sigmas": True}
    ends: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
    best = [
        ("UniPCMultistepScheduler", {"solver_order": 2, "use_exponential_sigmas": True, **ends}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "dpmsolver", **karras, **ends}),
        ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1", "predict_x0": False, **karras, **ends}),
    ]
    ratios = []
    for nfe in (5, 8, 10, 16):
        s = schedulers.recommend(nfe)
        ours = mean(unseen.errors(s.sample(unseen.network, unseen.x, s.steps_for(nfe))))
        runs = [benchmark.run_theirs(name, options, nfe) for name, options in best]
        ratios.append(ours / min(mean(benchmark.errors(unseen, run, nfe)[0]) for run in runs))
    assert max(ratios) < 1.1
    assert mean(ratios) < 0.9


def test_the_error_keeps_falling_where_that_of_diffusers_stalls(unseen: Exam) -> None:
    for s in (schedulers.get("deis", order=3), schedulers.recommend(80)):
        assert mean(unseen.errors(s.sample(unseen.network, unseen.x, 80))) < 2e-5


def test_wrong_budgets() -> None:
    for nfe in (0, -3, 2.5, True, "8"):
        with pytest.raises(ValueError, match="nfe must be a whole number, at least 1"):
            schedulers.recommend(nfe)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown noise schedule"):
        schedulers.recommend(8, noise="sclaed_linear")


# steps_for


@pytest.mark.parametrize("name", [name for name, s in sorted(SOLVERS.items()) if not (s.is_plugin or s.native_only)])
def test_steps_for_is_the_way_back_from_nfe(name: str) -> None:
    s = schedulers.get(name)
    for nfe in (3, 8, 21):
        steps = s.steps_for(nfe)
        assert s.nfe(steps) <= nfe < s.nfe(steps + 1)


def test_steps_for_a_grid_of_given_length() -> None:
    s = schedulers.get("heun", grid=[900, 500, 100])
    assert s.steps_for(5) == s.steps_for(50) == 3
    with pytest.raises(ValueError, match="needs more than 4 evaluations"):
        s.steps_for(4)
    with pytest.raises(ValueError, match="needs more than 0 evaluations"):
        schedulers.get("euler").steps_for(0)


# Grids with a number


def test_a_grid_name_may_carry_its_number_after_a_colon() -> None:
    noise = NoiseSchedule.scaled_linear()
    for name, parameter, value in (
        ("karras", "rho", 5.0),
        ("polyexponential", "rho", 0.75),
        ("linear_quadratic", "threshold", 0.05),
    ):
        s = schedulers.get("euler", grid=f"{name}:{value:g}")
        assert s.grid_name == f"{name}:{value:g}"
        assert s.grid(9).points == build(partial(GRIDS[name], **{parameter: value}), noise, 9).points
        assert s.grid(9).points != schedulers.get("euler", grid=name).grid(9).points
    for wrong in ("karras:", "karras:x", "karras:0", "karras:-1", "karras:inf", "trailing:3"):
        with pytest.raises(schedulers.UnknownName, match=f"did you mean '{wrong.partition(':')[0]}'"):
            schedulers.get("euler", grid=wrong)


# The exam


def test_the_exam_knows_the_answer() -> None:
    """On one Gaussian: euler's error is that of its closed form, x0 at each step an affine map."""
    gaussian, noise = Gaussian([0.3, -0.2], 0.5), NoiseSchedule.scaled_linear()
    exam = Exam([gaussian], noise, starts=16)
    s = schedulers.get("euler", grid="karras")
    result = s.sample(exam.network, exam.x, 7)
    assert exam.evaluations == 7
    first, last = noise.noisiest, noise.at(t=0.0)
    end = gaussian.solve(exam.x.double(), first, last)
    predicted = gaussian.denoise(end, last.alpha, last.sigma)[0]
    expected = (result - predicted).square().mean(1).sqrt().median()
    assert exam.errors(result) == pytest.approx([expected.item()], rel=1e-6)
    assert exam.errors(predicted) == pytest.approx([0.0], abs=1e-9)
    assert 1e-4 < exam.errors(predicted, to_zero=True)[0] < 1e-2  # the last step itself
    assert exam.errors(result * math.nan) == [math.inf]


# The page


def test_every_built_in_solver_has_a_formula_and_a_use() -> None:
    assert all(s.formula and s.when for s in SOLVERS.values() if not s.is_plugin)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs/schedulers.md").read_text("utf-8")
    assert script("docs/tables.py").written(page) == page, "run python docs/tables.py"
    for nfe in (5, 8, 10, 16, 40, 80):
        s = schedulers.recommend(nfe)
        assert f"\n| {nfe} | {s.name}, order {s.options['order']}, {s.grid_name} |" in page
