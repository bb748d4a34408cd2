"""tune: the grid beats every built-in one on held-out noises; otherwise no file is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import schedulers
from diffgen.comparison import search
from diffgen.comparison.plan import Entry
from diffgen.comparison.search import Learned, NotBetter, Settings, Starts, TunedGrid, Tuner
from diffgen.comparison.subjects import MixtureSubject

QUICK = Settings(iterations=48, noises=6, held_out=6, every=8)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TunedGrid, Path]:
    grid = tune("dpmpp_2m", 5, QUICK)
    path = tmp_path_factory.mktemp("tune") / "grid.json"
    path.write_text(search.as_json(grid))
    return grid, path


def tune(label: str, nfe: int, settings: Settings = QUICK) -> TunedGrid:
    return Tuner(MixtureSubject(), label, lambda seed: "", settings=settings).tune(nfe)


@pytest.fixture(scope="module")
def unseen() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noises that no search draws, and their exact solutions."""
    subject = MixtureSubject()
    noises = [subject.start(seed)[0] for seed in range(900, 904)]
    return [(noise, subject.exact(noise)) for noise in noises]


def error(label: str, grid: str, unseen: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The error of a scheduler at 5 evaluations, by the native loop."""
    subject = MixtureSubject()
    scheduler = Entry(label, label, grid).build(subject)
    distances = []
    for noise, aim in unseen:
        x0 = scheduler.sample(subject.network(), noise * scheduler.init_noise_sigma, scheduler.steps_for(5))
        distances.append(float((x0 - aim).square().mean().sqrt()))
    return sum(distances) / len(distances)


def test_the_learned_grid_is_better_on_noises_never_seen(tuned: tuple[TunedGrid, Path], unseen: list) -> None:
    built_in = min(error("dpmpp_2m", name, unseen) for name in schedulers.grid_names())
    assert error("dpmpp_2m", str(tuned[1]), unseen) < 0.5 * built_in


def test_the_file_says_what_it_is_for(tuned: tuple[TunedGrid, Path]) -> None:
    grid, path = tuned
    content = json.loads(path.read_text())
    assert content["schema"] == "diffgen.grid/1"
    assert content["solver"] == "dpmpp_2m"
    assert content["nfe"] == 5
    assert content["model_hash"] == MixtureSubject().model_hash
    assert content["guidance"] == 1.0
    assert content["ratio"] == pytest.approx(content["error"] / content["built_in"]["error"])
    assert min(point["error"] for point in content["validation"]) == pytest.approx(content["error"])
    scheduler = schedulers.get("dpmpp_2m", grid=str(path))
    assert scheduler.nfe(5) == 5
    assert len(grid.gains) == 5
    assert [len(row) for row in grid.corrections] == [4] * 5
    for i, row in enumerate(grid.corrections):
        assert all(row[:i])  # a row has as many numbers as there are earlier answers
        assert not any(row[i:])


def test_it_begins_at_the_best_built_in_grid(tuned: tuple[TunedGrid, Path]) -> None:
    grid, _ = tuned
    assert grid.validation[0].error == pytest.approx(min(grid.built_in.all.values()), rel=0.25)


@pytest.mark.parametrize("noise", [schedulers.NoiseSchedule.scaled_linear(), schedulers.NoiseSchedule.flow(3.0)])
def test_the_parameters_mean_the_grid_that_they_began_with(noise: schedulers.NoiseSchedule) -> None:
    prediction = "flow_prediction" if noise.name == "flow" else "epsilon"
    points = schedulers.get("dpmpp_2m", noise=noise, prediction=prediction, grid="karras").grid(6).points[:-1]
    with torch.no_grad():
        again = Learned(noise, points, corrections=True).points()
    for p, q in zip(points, again, strict=True):
        assert float(q.sigma) == pytest.approx(p.sigma, rel=0.02, abs=1e-4)
        assert float(q.t) == pytest.approx(p.t, rel=0.02, abs=2.0)
    learned = Learned(noise, points, corrections=True)
    with torch.no_grad():
        learned.gaps += torch.randn(len(points), generator=torch.Generator().manual_seed(1)) * 3
        learned.offsets += 500
        moved = learned.points()
    sigmas = [float(p.sigma / p.alpha) if float(p.alpha) else float("inf") for p in moved]
    assert sigmas == sorted(sigmas, reverse=True)
    assert all(0 <= float(p.t) <= noise.t_max for p in moved)


def test_errors_are_counted_for_each_seed() -> None:
    starts = Starts(torch.zeros(6, 2), [4, 5], ["a"] * 3 + ["b"] * 3, torch.zeros(6, 2))
    result = torch.tensor([[1.0, 1.0]] * 3 + [[2.0, 0.0]] * 3)
    assert starts.errors(result).tolist() == pytest.approx([1.0, 2**0.5])
    part = starts.part([1])
    assert part.seeds == [5]
    assert part.prompts == ["b"] * 3
    assert len(part.x) == 3


def test_nothing_better_is_no_file() -> None:
    with pytest.raises(NotBetter, match="no better grid") as excinfo:
        tune("dpmpp_2m", 5, Settings(iterations=1, noises=1, held_out=2, margin=0.9))
    assert excinfo.value.code == 1


def test_refused_searches() -> None:
    with pytest.raises(ValueError, match="draws noise"):
        tune("euler_ancestral", 5)
    with pytest.raises(ValueError, match="which a grid file does not record"):
        tune("uni_pc_bh1", 5)
    with pytest.raises(ValueError, match="exactly 4"):
        tune("heun", 4)


def test_a_result_that_is_not_finite_is_only_a_bad_one() -> None:
    """A line search may try anything."""
    subject = MixtureSubject()
    tuner = Tuner(subject, "dpmpp_2m", lambda seed: "", settings=Settings(iterations=1, noises=1, held_out=1))
    for starts in (tuner.train, tuner.test):
        starts.solution = tuner.solver.teacher(starts, 1)
    learned = Learned(subject.noise, tuner.solver.scheduler("karras").grid(3).points[:-1], corrections=True)
    with torch.no_grad():
        learned.corrections[:, 0] = 1e30
    assert {check.error for check in tuner._search(learned)} == {search.NOT_FINITE}


def test_held_out_noises_are_never_learned_from() -> None:
    with pytest.raises(ValueError, match="769 are too many"):
        tune("dpmpp_2m", 5, Settings(noises=769))
