"""Comparisons: counted budgets, equal starting noises, errors against the exact solution, nothing computed twice."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import schedulers
from diffgen.comparison import metrics, plan
from diffgen.comparison.measure import measure
from diffgen.comparison.results import Results
from diffgen.comparison.run import Comparison, ReferenceSpec
from diffgen.comparison.subjects import MixtureSubject
from diffgen.comparison.tables import as_csv
from diffgen.comparison.verdict import failure
from diffgen.errors import ExitCode, InputError, UsageError


def compared(folder: Path, labels: str = "euler,heun,deis,euler_ancestral", nfe: str = "5,10", seeds: str = "0-2"):
    axes = plan.Axes(
        plan.parse_entries(labels.split(",")), plan.parse_budgets(nfe), plan.parse_seeds(seeds), ("",), (1.0,)
    )
    folder.mkdir(exist_ok=True)
    comparison = Comparison(MixtureSubject(), axes, ReferenceSpec.parse("auto", exact=True), folder)
    keys = [task.key for task in comparison.make()]
    return comparison, measure(comparison, "diffgen compare"), keys


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("compare") / "small"
    return *compared(folder)[:2], folder


# The axes


def test_a_budget_allows_the_most_steps_and_is_counted(small) -> None:
    _, results, _ = small
    for cell in results.cells:
        assert cell.status == "done"
        scheduler = schedulers.get(cell.scheduler, grid=cell.grid)
        assert cell.nfe <= cell.budget < scheduler.nfe(cell.steps + 1)
    heun = {cell.budget: cell.nfe for cell in results.cells if cell.scheduler == "heun"}
    assert heun == {5: 5, 10: 9}  # two evaluations a step, one in the last


def test_cells_of_one_seed_start_from_the_same_noise(small) -> None:
    _, results, _ = small
    by_seed: dict[int, set[str]] = {}
    for cell in results.cells:
        by_seed.setdefault(cell.seed, set()).add(cell.noise_sha256)
    assert all(len(hashes) == 1 for hashes in by_seed.values())
    assert len(set.union(*by_seed.values())) == len(by_seed) == 3


def test_schedulers_take_turns() -> None:
    entries = plan.parse_entries(["euler", "deis"])
    cells = plan.Axes(entries, (5, 10), (0, 1), ("",), (1.0,)).cells(MixtureSubject())
    assert [cell.entry.scheduler for cell in cells] == ["euler", "deis"] * 4


@given(st.lists(st.integers(0, 500), min_size=1, max_size=6))
def test_numbers_are_parsed(numbers: list[int]) -> None:
    expected = tuple(dict.fromkeys(numbers))
    assert plan.parse_numbers("--seeds", ",".join(map(str, numbers)), 0, 500) == expected
    low = min(numbers)
    assert plan.parse_numbers("--seeds", f"{low}-{low + 5}", 0, 505) == tuple(range(low, low + 6))


@pytest.mark.parametrize("text", ["", "x", "3-1", "1;2", "-1", "1-", "0-99999999999", "1e3"])
def test_text_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        plan.parse_seeds(text)


def test_entries() -> None:
    entries = plan.parse_entries(["DPM++ 2M Karras", "dpmpp_2m", "euler"])
    assert [(e.scheduler, e.grid) for e in entries] == [("dpmpp_2m", "karras"), ("euler", "trailing")]
    assert len(plan.parse_entries(["euler", "heun"], ["karras", "trailing"])) == 4
    assert [e.stochastic for e in plan.parse_entries(["euler", "euler_ancestral", "lcm"])] == [False, True, True]
    for wrong in ("eular", "dpm_adaptive", "ddim_inverse"):
        with pytest.raises(UsageError):
            plan.parse_entries([wrong])
    with pytest.raises(UsageError):
        plan.parse_entries(["euler"], ["karass"])
    with pytest.raises(InputError):
        plan.parse_entries(["euler"], ["nowhere.json"])


def test_too_many_cells_are_refused() -> None:
    entries = plan.parse_entries(["euler"])
    with pytest.raises(UsageError, match="too many"):
        plan.Axes(entries, (5,), tuple(range(plan.MAX_CELLS + 1)), ("",), (1.0,)).cells(MixtureSubject())


# The figures


def test_errors_are_distances_to_the_solution(small) -> None:
    """Against an independent solution: SciPy's integrator on the probability-flow ODE of the mixture."""
    from scipy.integrate import solve_ivp

    comparison, results, _ = small
    subject = comparison.subject
    noise, _ = subject.start(1)
    few = noise[:8].double()
    first, last = subject.noise.noisiest, subject.noise.at(t=subject.noise.t_min)

    def slope(theta: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).reshape(-1, 2)
        x0, eps = subject.mixture.denoise(state, math.cos(theta), math.sin(theta))
        return (math.cos(theta) * eps - math.sin(theta) * x0).flatten().numpy()

    span = math.atan2(first.sigma, first.alpha), math.atan2(last.sigma, last.alpha)
    end = solve_ivp(slope, span, few.flatten().numpy(), rtol=1e-9, atol=1e-11).y[:, -1]
    aim, _ = subject.mixture.denoise(torch.from_numpy(end).reshape(-1, 2), last.alpha, last.sigma)
    assert torch.allclose(subject.exact(noise)[:8].double(), aim, atol=2e-6)

    cell = next(c for c in results.cells if c.scheduler == "deis" and c.budget == 10 and c.seed == 1)
    network = subject.network()
    x = noise * math.hypot(first.alpha, first.sigma)
    again = schedulers.get("deis", noise=subject.noise).sample(network, x, cell.steps)
    assert cell.error == pytest.approx(float((again - subject.exact(noise)).square().mean().sqrt()), rel=1e-5)


def test_stochastic_solvers_have_no_error_and_no_rank(small) -> None:
    _, results, _ = small
    for row in results.rows:
        if row.scheduler == "euler_ancestral":
            assert row.stochastic
            assert row.error is None
            assert row.rank is None
            assert row.metrics["sliced_wasserstein"].mean > 0
            assert row.metrics["covariance_error"].mean > 0
    floor = np.mean([start.metrics["sliced_wasserstein"] for start in results.reference.starts])
    coarse = next(r for r in results.rows if r.scheduler == "euler_ancestral" and r.budget == 5)
    assert coarse.metrics["sliced_wasserstein"].mean > floor


def test_ranks_follow_the_intervals(small) -> None:
    _, results, _ = small
    for budget in (5, 10):
        rows = [r for r in results.rows if r.budget == budget and r.error is not None]
        rows.sort(key=lambda r: r.error.mean)
        assert rows[0].rank == 1
        for row in rows[1:]:
            apart = row.error.low > rows[0].error.high
            assert (row.rank > 1) == apart
    words = " ".join(results.verdict)
    assert "At 5 evaluations" in words
    assert "euler_ancestral draws noise: it has no fixed solution to measure against, so it is not ranked." in words


def test_one_seed_gives_no_ranks(tmp_path: Path) -> None:
    _, results, _ = compared(tmp_path / "one", "euler,deis", "6", "3")
    assert all(row.rank is None and row.error.low is None for row in results.rows)
    assert "one seed is too few to rank" in results.verdict[0]


def test_a_numerical_reference_knows_its_own_error(tmp_path: Path) -> None:
    axes = plan.Axes(plan.parse_entries(["euler"]), (5,), (0, 1), ("",), (1.0,))
    comparison = Comparison(MixtureSubject(), axes, ReferenceSpec.parse("dpmpp_2m:64", exact=True), tmp_path)
    list(comparison.make())
    results = measure(comparison, "")
    assert results.reference.kind == "numerical"
    for start in results.reference.starts:
        true = metrics.rms(
            comparison.folder.result(start.key).numpy(),
            comparison.subject.exact(comparison.subject.start(start.seed)[0]).numpy(),
        )
        assert true / 5 < start.error < true * 5  # an estimate from half the evaluations


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=40))
def test_intervals_are_students(values: list[float]) -> None:
    mean = metrics.interval(values)
    se = scipy.stats.sem(values)
    assert mean.mean == pytest.approx(np.mean(values), abs=1e-9)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * se
    assert mean.high - mean.mean == pytest.approx(half, rel=1e-3, abs=1e-9)


def test_ssim_and_psnr() -> None:
    """Against the definition, window by window."""
    draw = np.random.default_rng(0)
    a = draw.integers(0, 256, (16, 14, 3), dtype=np.uint8)
    b = np.clip(a + draw.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    place = np.arange(11) - 5.0
    window = np.exp(-(place[:, None] ** 2 + place**2) / 4.5)
    window /= window.sum()
    values = []
    for c in range(3):
        for i in range(16 - 10):
            for j in range(14 - 10):
                x, y = (p[i : i + 11, j : j + 11, c].astype(float) for p in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    one, other = Image.fromarray(a), Image.fromarray(b)
    assert metrics.ssim(one, other) == pytest.approx(np.mean(values), rel=1e-6)
    assert metrics.ssim(one, one) == pytest.approx(1)
    assert metrics.psnr(one, one) is None
    mse = np.square(a.astype(float) - b).mean()
    assert metrics.psnr(one, other) == pytest.approx(10 * math.log10(255**2 / mse))


def test_order_of_a_known_curve() -> None:
    nfe = [5, 10, 20, 40]
    assert metrics.order(nfe, [3.0 * n**-2.5 for n in nfe]) == pytest.approx(2.5)
    assert metrics.order([5, 10], [1, 2]) is None


# Doing it


def test_nothing_is_done_twice_and_a_comparison_grows(tmp_path: Path) -> None:
    _, before, keys = compared(tmp_path / "c", "euler,deis", "5", "0-1")
    assert len(keys) == 2 * 2 + 2  # and the exact solution of each seed
    assert compared(tmp_path / "c", "euler,deis", "5", "0-1")[2] == []
    _, after, keys = compared(tmp_path / "c", "euler,deis", "5,7", "0-1")
    assert len(keys) == 4
    old = [cell for cell in after.cells if cell.budget == 5]
    assert [cell.error for cell in old] == [cell.error for cell in before.cells]
    assert [cell.seconds for cell in old] == [cell.seconds for cell in before.cells]


def test_an_incomplete_record_is_computed_again(tmp_path: Path) -> None:
    comparison, _, _ = compared(tmp_path / "c", "euler", "5", "0")
    key = comparison.key(comparison.cells[0])
    record = tmp_path / "c" / "cells" / f"{key}.json"
    record.write_text(record.read_text()[:40])
    assert compared(tmp_path / "c", "euler", "5", "0")[2] == [key]


def test_an_impossible_cell_is_shown_and_the_others_continue(tmp_path: Path) -> None:
    grid = {"schema": "diffgen.grid/1", "solver": "dpmpp_2m", "nfe": 3, "sigmas": [14.6, 2.0, 0.3]}
    (tmp_path / "tuned.json").write_text(json.dumps(grid))
    axes = plan.Axes(
        plan.parse_entries(["euler", "dpmpp_2m"], [str(tmp_path / "tuned.json")]), (3,), (0, 1), ("",), (1.0,)
    )
    comparison = Comparison(MixtureSubject(), axes, ReferenceSpec.parse("auto", exact=True), tmp_path)
    list(comparison.make())
    results = measure(comparison, "")
    by = {(cell.scheduler, cell.seed): cell for cell in results.cells}
    assert {cell.grid for cell in results.cells} == {"tuned.json"}
    assert by["dpmpp_2m", 1].status == "done"
    assert by["dpmpp_2m", 1].nfe == 3
    assert by["euler", 0].status == "failed"
    assert "tuned for dpmpp_2m" in by["euler", 0].reason
    assert any("2 of 4 cells failed" in sentence for sentence in results.verdict)


def test_equal_pictures_are_reported(tmp_path: Path) -> None:
    """At one evaluation every solver's step is x' = x0."""
    _, results, _ = compared(tmp_path / "c", "dpmpp_2m,deis,unipc", "1", "0-1")
    assert len(results.duplicates) == 3
    assert all(d.expected for d in results.duplicates)


def test_the_csv_is_safe_in_a_spreadsheet(small) -> None:
    _, results, _ = small
    cell = replace(results.cells[0], prompt="=HYPERLINK(1)", label="+x")
    row = next(csv.DictReader(io.StringIO(as_csv([cell]))))
    assert row["prompt"] == "'=HYPERLINK(1)"
    assert row["label"] == "'+x"
    assert float(row["error"]) == results.cells[0].error


def test_results_are_json(small) -> None:
    _, results, _ = small
    content = results.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["schema"] == "diffgen.compare/1"
    assert Results.from_json(content, results.folder) == results


# What goes wrong


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-8", "", "3"])
def test_a_wrong_reference_is_refused(number: str) -> None:
    with pytest.raises(UsageError, match="--reference must be"):
        ReferenceSpec.parse(f"euler:{number}", exact=False)


def test_many_seeds_have_students_interval_too() -> None:
    for n in (31, 32, 60, 400):
        mean = metrics.interval([0.0, 1.0] * (n // 2) + [0.5] * (n % 2))
        half = scipy.stats.t.ppf(0.975, n - 1) * np.std([0.0, 1.0] * (n // 2) + [0.5] * (n % 2), ddof=1) / math.sqrt(n)
        assert mean.high - mean.mean == pytest.approx(half, rel=2e-4)


@pytest.mark.parametrize("damage", ["no picture", "half a picture", "no count", "cut off"])
def test_an_incomplete_cell_is_computed_again(tmp_path: Path, damage: str) -> None:
    comparison, _, keys = compared(tmp_path / "made", "euler", "5", "0")
    if damage == "no picture":
        (tmp_path / "made" / "images" / f"{keys[0]}.png").unlink()
    elif damage == "half a picture":
        picture = tmp_path / "made" / "images" / f"{keys[0]}.png"
        picture.write_bytes(picture.read_bytes()[:300])
    elif damage == "no count":
        file = tmp_path / "made" / "cells" / f"{keys[0]}.json"
        record = json.loads(file.read_text())
        del record["nfe"]
        file.write_text(json.dumps(record))
    else:
        file = comparison.folder.tensor_file(keys[0])
        file.write_bytes(file.read_bytes()[:-9])
    assert compared(tmp_path / "made", "euler", "5", "0")[2] == keys[:1]


def test_errors_below_the_accuracy_of_the_reference_share_a_rank(tmp_path: Path) -> None:
    """Below three times its own error any order would be chance; the reference itself has no rank."""
    axes = plan.Axes(plan.parse_entries(["dpmpp_2m", "deis"]), (20, 40), (0, 1, 2), ("",), (1.0,))
    comparison = Comparison(MixtureSubject(), axes, ReferenceSpec.parse("dpmpp_2m:40", exact=True), tmp_path)
    list(comparison.make())
    results = measure(comparison, "diffgen compare")
    rows = {(row.label, row.budget): row for row in results.rows}
    floor = results.reference.error
    itself = rows["dpmpp_2m", 40]
    assert (itself.is_reference, itself.rank, itself.error.mean) == (True, None, 0.0)
    near = [rows["dpmpp_2m", 20], rows["deis", 20]]
    assert max(row.error.mean for row in near) < 3 * floor
    assert [row.rank for row in near] == [1, 1]
    assert "The reference itself is not ranked: dpmpp_2m on karras at 40." in results.verdict
    assert "the 2 schedulers are statistically tied over 3 seeds" in results.verdict[0]


class Failing(MixtureSubject):
    """The mixture, with a network that is not finite for one seed, or without an exact solution."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.seed, self.model_hash = seed, f"failing {seed}"

    def start(self, seed: int):
        noise, generator = super().start(seed)
        return noise * (math.nan if seed == self.seed else 1), generator

    def exact(self, noise: torch.Tensor) -> torch.Tensor:
        if self.seed is None:
            raise ValueError("no solution")
        return super().exact(noise.nan_to_num())


def finished(subject: MixtureSubject, folder: Path) -> Comparison:
    axes = plan.Axes(plan.parse_entries(["euler", "deis"]), (5,), (0, 1, 2), ("",), (1.0,))
    comparison = Comparison(subject, axes, ReferenceSpec.parse("auto", exact=True), folder)
    for _ in comparison.make():
        pass
    return comparison


def results_of(subject: MixtureSubject, folder: Path) -> Results:
    return measure(finished(subject, folder), "diffgen compare")


def test_a_failure_has_its_exit_code(tmp_path: Path) -> None:
    assert finished(Failing(3), tmp_path).codes == set()
    assert finished(Failing(1), tmp_path).codes == {ExitCode.OUTPUT}
    assert finished(Failing(None), tmp_path).codes == {ExitCode.FAILED}


def test_a_scheduler_with_a_failed_seed_is_not_ranked(tmp_path: Path) -> None:
    results = results_of(Failing(1), tmp_path)
    assert [(row.done, row.failed, row.rank) for row in results.rows] == [(2, 1, None)] * 2
    assert not any("nearest" in sentence for sentence in results.verdict)
    assert any("2 of 6 cells failed: not finite" in sentence for sentence in results.verdict)
    assert "2 of 6 cells failed: not finite" in str(failure(results))


def test_a_failed_reference_is_reported(tmp_path: Path) -> None:
    results = results_of(Failing(None), tmp_path)
    assert results.reference.reason == "no solution"
    assert str(failure(results)) == "a reference could not be computed: no solution"
    assert "A reference could not be computed: no solution." in results.verdict
    assert {cell.status for cell in results.cells} == {"done"}


def test_a_tuned_grid_at_another_budget_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    times = [999, 700, 400, 100]
    file.write_text(json.dumps({"schema": "diffgen.grid/1", "solver": "euler", "nfe": 4, "times": times}))
    axes = plan.Axes(plan.parse_entries(["euler"], [str(file)]), (4, 6), (0,), ("",), (1.0,))
    comparison = Comparison(MixtureSubject(), axes, None, tmp_path / "made")
    assert comparison.notes() == ["the grid mine.json was tuned for 4 steps; it is interpolated to 6"]
    for _ in comparison.make():
        pass
    assert measure(comparison, "").verdict[-1].startswith("The grid mine.json was tuned for 4 steps")


def test_the_estimate_includes_what_is_done_besides_evaluations(tmp_path: Path) -> None:
    """Results of the mixture are drawn, written and measured, which takes longer than its network."""
    from diffgen.comparison.compare import prepare

    one, many = (
        prepare(model="mixture", schedulers="euler", nfe="2", seeds=seeds, folder=tmp_path / "c")
        for seeds in ("0", "0-9")
    )
    estimate = many.estimate()
    assert estimate.evaluations == 20
    assert estimate.seconds > one.estimate().seconds > 0
    assert estimate.seconds > 10 * estimate.evaluations * max(estimate.seconds_each)
    assert not (tmp_path / "c").exists()
