"""The recommended scheduler fits its budget and has little error on mixtures that the choice did not use."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import schedulers
from schedulers import NoiseSchedule
from schedulers.exact import Exam, Gaussian, Mixture
from schedulers.grids import GRIDS, build
from schedulers.recommend import KINDS, advice, kind_of
from schedulers.solver import SOLVERS

ROOT = Path(__file__).parent.parent
SIGMA_MIN: dict[str, Any] = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
FLOW: dict[str, Any] = {"flow_shift": 1.0, "prediction_type": "flow_prediction"}
ENDS_NOISY: dict[str, Any] = {**FLOW, "use_flow_sigmas": True, "final_sigmas_type": "sigma_min"}
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
    """Compared with dpmpp_2m and heun on karras and on trailing, on any schedule, from six evaluations on."""
    schedule, prediction = NOISES[noise]
    exam = Exam([Mixture.random(seed) for seed in range(300, 304)], schedule, prediction, starts=32)
    for nfe in (6, 8, 16, 40):
        candidates = [schedulers.recommend(nfe, noise=schedule, prediction=prediction)]
        for name in ("dpmpp_2m", "heun"):
            candidates += [
                schedulers.get(name, noise=schedule, prediction=prediction, grid=grid)
                for grid in (SOLVERS[name].grid, "trailing")
            ]
        errors = [mean(exam.errors(s.sample(exam.network, exam.x, s.steps_for(nfe)))) for s in candidates]
        assert errors[0] < min(errors[1:]), (nfe, errors)


BEST: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {  # of diffusers, by `benchmarks/error_per_nfe.py`
    "scaled_linear": {
        5: ("UniPCMultistepScheduler", {"solver_order": 1, "solver_type": "bh1", "predict_x0": False, **SIGMA_MIN}),
        8: ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "dpmsolver", **SIGMA_MIN}),
        16: ("UniPCMultistepScheduler", {"solver_order": 3, "use_exponential_sigmas": True}),
    },
    "flow:1": {
        5: ("UniPCMultistepScheduler", {"solver_order": 2, "use_flow_sigmas": True, **FLOW}),
        8: ("UniPCMultistepScheduler", {"solver_order": 2, "use_flow_sigmas": True, **FLOW}),
        16: ("UniPCMultistepScheduler", {"solver_order": 3, "use_flow_sigmas": True, **FLOW}),
        40: ("UniPCMultistepScheduler", {"solver_order": 3, "use_flow_sigmas": True, **FLOW}),
    },
    "flow:3": {
        5: ("DPMSolverSinglestepScheduler", {"solver_order": 3, **ENDS_NOISY, "flow_shift": 3.0}),
        8: ("DPMSolverSinglestepScheduler", {"solver_order": 3, **ENDS_NOISY, "flow_shift": 3.0}),
        16: ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    },
    "flow:6": {
        5: ("DPMSolverSinglestepScheduler", {"solver_order": 3, **ENDS_NOISY, "flow_shift": 6.0}),
        8: ("FlowMatchEulerDiscreteScheduler", {"shift": 6.0, "use_beta_sigmas": True}),
        16: ("DPMSolverSinglestepScheduler", {"solver_order": 2, **ENDS_NOISY, "flow_shift": 6.0}),
    },
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", BEST)
def test_against_the_best_of_diffusers(name: str) -> None:
    """On mixtures that the choice did not use, no larger error at any budget, and 0.6 of it in the geometric mean."""
    benchmark = script("benchmarks/error_per_nfe.py")
    exam = benchmark.exam_of(name, range(200, 212), 12)
    ratios = []
    for nfe, (cls, options) in BEST[name].items():
        s = schedulers.recommend(nfe, noise=exam.noise, prediction=exam.prediction)
        ours = mean(benchmark.errors_of(s, exam, nfe)[0])
        ratios.append(ours / mean(benchmark.errors(exam, benchmark.run_theirs(cls, options, nfe), nfe)[0]))
    assert max(ratios) < 1.0, ratios
    assert mean(ratios) < 0.6, ratios


def test_the_table_is_complete_and_in_order() -> None:
    """Each kind's rows reach up to any number; solvers, options and grids exist; some schedule is of each kind."""
    schedules = [*(noise for noise, _ in NOISES.values()), NoiseSchedule.flow(1.0)]
    assert {kind_of(noise).name for noise in schedules} == {kind.name for kind in KINDS}
    for kind in KINDS:
        bounds = [row[0] for row in kind.rows]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == math.inf
        for most, name, options, grid in kind.rows:
            s = schedulers.get(name, grid=grid, **options)
            assert (s.name, s.grid_name, most > 0) == (name, grid, True)
            assert kind.name in advice(name)


def test_advice_in_words() -> None:
    assert advice("heun") == ""
    assert advice("gradient_estimation").startswith("up to 4 evaluations on Stable Diffusion's noise")
    assert advice("deis").startswith("8 or more evaluations on Stable Diffusion's noise")
    assert "7 to 13 evaluations on flows with a shift up to 1.5" in advice("ipndm")


@pytest.mark.parametrize("name", sorted(name for name, s in SOLVERS.items() if s.grid in ("karras", "exponential")))
def test_the_default_grid_of_a_flow_is_no_ramp(name: str) -> None:
    for noise, prediction in (NOISES[n] for n in ("flow", "pure noise", "cosine")):
        assert schedulers.get(name, noise=noise, prediction=prediction).grid_name == "beta57"
    assert schedulers.get(name, noise="edm").grid_name == SOLVERS[name].grid
    assert schedulers.get(f"{name} karras", noise="flow", prediction="flow_prediction").grid_name == "karras"


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpmpp_2s", "dpmpp_2m", "deis", "lms", "ipndm", "pndm"])
@pytest.mark.parametrize("noise", ["flow", "pure noise"])
def test_the_default_grid_of_a_flow_has_less_error_than_karras(name: str, noise: str) -> None:
    schedule, prediction = NOISES[noise]
    exam = Exam([Mixture.random(seed) for seed in range(300, 306)], schedule, prediction, starts=24)
    for nfe in (5, 8, 10):
        default, ramp = (
            schedulers.get(name, noise=schedule, prediction=prediction, grid=grid) for grid in (None, "karras")
        )
        errors = [mean(exam.errors(s.sample(exam.network, exam.x, s.steps_for(nfe)))) for s in (default, ramp)]
        assert errors[0] < errors[1], (nfe, errors)


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
        ("trailing", "shift", 0.5),
    ):
        s = schedulers.get("euler", grid=f"{name}:{value:g}")
        assert s.grid_name == f"{name}:{value:g}"
        assert s.grid(9).points == build(partial(GRIDS[name], **{parameter: value}), noise, 9).points
        assert s.grid(9).points != schedulers.get("euler", grid=name).grid(9).points
    for wrong in ("karras:", "karras:x", "karras:0", "karras:-1", "karras:inf", "simple:3"):
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


@pytest.mark.parametrize("name", ["schedulers.md", "which-scheduler.md", "models.md"])
def test_the_pages_are_up_to_date(name: str) -> None:
    page = (ROOT / "docs" / name).read_text("utf-8")
    assert script("docs/tables.py").written(page) == page, "run python docs/tables.py"


def test_the_exam_takes_mixtures_of_several_shapes() -> None:
    """Each mixture's network and error are those of its own exam, whatever stands beside it."""
    mixtures = [
        Mixture.random(1, 2, 3, 0.4),
        Mixture.random(2, 9, 7),
        Mixture([[0.0, 1, 2], [1, 2, -1]], [0.2, 0.7], [1, 3]),
    ]
    noise = NoiseSchedule.scaled_linear()
    exam = Exam(mixtures, noise, starts=5, dtype=torch.float64)
    s = schedulers.get("deis", grid="karras")
    result = s.sample(exam.network, exam.x, 6)
    for i, (mixture, error) in enumerate(zip(mixtures, exam.errors(result), strict=True)):
        rows, elements = slice(5 * i, 5 * i + 5), mixture.means.shape[1]
        assert not exam.x[rows, elements:].any()
        assert not result[rows, elements:].any()
        x = exam.x[rows, :elements]
        alone = s.sample(mixture.denoiser(noise), x.float(), 6)
        assert (alone - result[rows, :elements]).abs().max() < 1e-4
        last = noise.at(t=0.0)
        exact = mixture.denoise(mixture.solve(x, noise.noisiest, last), last.alpha, last.sigma)[0]
        assert error == pytest.approx(
            (result[rows, :elements] - exact).square().mean(1).sqrt().median().item(), rel=1e-9
        )
