"""compare, tune and the plot of grids as Python functions, and the border between results and JSON."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import diffgen
from diffgen.comparison import grid_plot
from diffgen.comparison.compare import Estimate
from diffgen.comparison.results import Results
from diffgen.comparison.search import TunedGrid
from diffgen.errors import CannotWrite, InputError, UsageError

SMALL: dict[str, Any] = {"model": "mixture", "schedulers": ["euler", "deis"], "nfe": [4, 8], "seeds": range(2)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return diffgen.compare(**SMALL, out=tmp_path_factory.mktemp("compare") / "c")


# compare


def test_compare_returns_what_it_writes(results: Results) -> None:
    assert results.folder is not None
    assert {"results.json", "results.csv", "report.html", "grid.png"} < {path.name for path in results.folder.iterdir()}
    stored = json.loads((results.folder / "results.json").read_text())
    assert stored == results.to_json()
    assert Results.from_json(stored, results.folder) == results
    assert len(results.cells) == 8
    assert [row.error.n for row in results.rows if row.error] == [2] * 4


def test_compare_reports_what_it_does_and_stops(tmp_path: Path, results: Results) -> None:
    estimates: list[Estimate] = []
    steps: list[tuple[int, int, str]] = []
    partial = diffgen.compare(
        **SMALL,
        out=tmp_path / "c",
        on_start=estimates.append,
        on_step=lambda *step: steps.append(step),
        stop=lambda: len(steps) == 3,
    )
    assert (estimates[0].cells, estimates[0].unfinished, estimates[0].evaluations) == (8, 10, 2 * 2 * (4 + 8))
    assert steps == [(4, 48, "mixture"), (8, 48, "mixture"), (16, 48, "mixture")]
    assert [cell.status for cell in partial.cells].count("done") == 3
    assert all(row.rank is None for row in partial.rows)
    complete = diffgen.compare(**SMALL, out=tmp_path / "c", resume=True, on_step=lambda *step: steps.append(step))
    assert len(steps) == 10
    assert [cell.error for cell in complete.cells] == [cell.error for cell in results.cells]


def test_an_exception_in_a_callback_ends_the_comparison_and_keeps_what_is_done(tmp_path: Path) -> None:
    def fail(done: int, total: int, text: str) -> None:
        raise KeyError(done)

    with pytest.raises(KeyError):
        diffgen.compare(**SMALL, out=tmp_path / "c", on_step=fail)
    assert len(list((tmp_path / "c" / "cells").glob("*.json"))) == 1
    with pytest.raises(CannotWrite, match="not empty"):
        diffgen.compare(**SMALL, out=tmp_path / "c")


def test_the_recorded_command_makes_the_same_comparison(diffgen_, tmp_path: Path) -> None:
    options = SMALL | {"grids": ["karras", "trailing"], "reference": "heun:40"}
    results = diffgen.compare(**options, out="c")
    words = shlex.split(results.command)
    assert words[:2] == ["diffgen", "compare"]
    code, out, err = diffgen_(*words[1:], "--resume", "--dry-run", "--json")
    assert code == 0, err
    counts = json.loads(out)["result"]
    assert (counts["cells"], counts["to_do"]) == (len(results.cells), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "euler"}, "did you mean 'schedulers'"),
        ({"sample": 3}, "did you mean 'samples'"),
        ({"zzz": 3}, "choose from prompts, out, resume"),
        ({"folder": Path("c")}, "no keyword 'folder'"),
        ({"nfe": [0]}, "--nfe"),
        ({"schedulers": "eular"}, "did you mean 'euler'"),
        ({"model": "mixture", "prompts": "a cat"}, "neither prompts"),
        ({"model": "mixture", "out": None}, "needs a folder"),
    ],
)
def test_compare_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as excinfo:
        diffgen.compare(**({"out": tmp_path / "c"} | options))
    assert message in f"{excinfo.value.message}; {excinfo.value.hint}"
    assert not (tmp_path / "c").exists()


# Results and JSON


def test_results_without_newer_keys_are_read(results: Results) -> None:
    content = results.to_json()
    for cell in content["cells"]:
        del cell["network_calls"]
    for row in content["rows"]:
        del row["missing"], row["is_reference"]
    del content["reference"]["reason"], content["distribution"], content["created"]
    old = Results.from_json(content)
    assert old.cells[0].network_calls is None
    assert [row.rank for row in old.rows] == [row.rank for row in results.rows]


def test_metrics_are_keys_beside_the_others(results: Results) -> None:
    content = results.to_json()
    cell = content["cells"][0]
    assert "metrics" not in cell
    names = ("error", "psnr", "ssim", "mean_error", "covariance_error", "sliced_wasserstein")
    assert {name: cell[name] for name in names} == results.cells[0].metrics
    assert content["reference"]["starts"][0]["error"] == 0.0
    assert content["orders"][0].keys() >= {"from", "to"}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("cells", 0, "budget"), "5", "results.cells[0].budget is str, expected int"),
        (("cells", 0, "stochastic"), 1, "results.cells[0].stochastic is int, expected bool"),
        (("rows", 1, "error"), 0.5, "results.rows[1].error is float, expected dict"),
        (("rows", 1, "seconds", "mean"), float("nan"), "results.rows[1].seconds.mean is nan"),
        (("axes", "seeds"), None, "results.axes.seeds is NoneType, expected list"),
        (("duplicates",), [{"cells": [[1]], "expected": True, "why": ""}], "has 1 values, expected 2"),
    ],
)
def test_wrong_results_are_refused_with_their_place(
    results: Results, place: tuple[Any, ...], value: Any, message: str
) -> None:
    content = json.loads(json.dumps(results.to_json()))
    inner: Any = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match="expected") as excinfo:
        Results.from_json(content)
    assert message in str(excinfo.value)


# tune


def test_tune_returns_what_it_writes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "mixture", "scheduler": "dpmpp_2m", "noises": 4}
    steps: list[tuple[int, int]] = []
    grid = diffgen.tune(
        **options, nfe=4, iterations=200, out=tmp_path / "g.json", on_step=lambda *s: steps.append(s),
        stop=lambda: len(steps) == 30,
    )  # fmt: skip
    assert isinstance(grid, TunedGrid)
    assert len(steps) == 30
    assert grid.error < 0.95 * grid.built_in.error
    assert json.loads((tmp_path / "g.json").read_text()) == grid.to_json()
    assert grid.picture is not None
    assert grid.picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CannotWrite):
        diffgen.tune(**options, nfe=4, out=tmp_path / "g.json")
    with pytest.raises(UsageError) as excinfo:
        diffgen.tune(**options, nfe=4, out=tmp_path / "h.json", iteration=3)
    assert excinfo.value.hint == "did you mean 'iterations'?"


# The plot of grids


def test_figures_of_grids_are_drawn_without_a_file() -> None:
    figures = grid_plot.grid_figures(["euler"], ["karras"], 4, ["5", "9"], "scaled_linear")
    assert [point.nfe for point in figures.errors] == [5, 9]
    assert len(figures.grids["karras"].sigma) == 4
    assert grid_plot.draw_grids(figures, "png").startswith(b"\x89PNG")
    with pytest.raises(InputError):
        grid_plot.grid_figures(["euler"], ["missing.json"], 4, ["5"], "scaled_linear")
