"""The picture of `diffgen schedulers plot`."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import schedulers
from diffgen.errors import UsageError
from diffgen.generation.grid_files import check_grid
from diffgen.images.publish import Exists, publish
from schedulers import NoiseSchedule, grids
from schedulers.noise import level_symbol

MIXTURES = range(4)  # seeds: six components of deviation 0.6 in four dimensions each
PREDICTION = {"cosine": "v_prediction", "flow": "flow_prediction"}  # epsilon elsewhere; the exact solution is the same
# Okabe and Ito's colours, which colour-blind people can tell apart; black is for `recommend`
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osD^vPX"
BESIDE: Any = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "frameon": False, "alignment": "left"}
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw(
    path: Path,
    names: Sequence[str],
    grid_names: Sequence[str],
    steps: int,
    nfe: Sequence[str],
    noise: str,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Check everything, measure, draw and publish: {path, noise, steps, grids, errors}.

    `grids` are {name: {t, sigma}}, sigma being σ/α, or σ on a flow; `errors` [{scheduler, solver, grid, nfe, steps,
    error}], the error a root-mean-square distance. Raises UsageError for the arguments, InputError for a grid file,
    CannotWrite for the path.
    """
    kind = path.suffix.lower()[1:]
    if kind not in ("png", "svg"):
        raise UsageError(f"-o must end in .png or .svg (got {str(path)!r})")
    if path.exists() and not overwrite:
        raise Exists(path)
    if not 1 <= steps <= 1000:
        raise UsageError(f"--steps must be a whole number from 1 to 1000 (got {steps})")
    budgets = sorted({_budget(text) for text in nfe})
    try:
        schedule = NoiseSchedule.named(noise)
        drawn = {name: grids.build(check_grid(name), schedule, steps) for name in grid_names}
        for name in names:
            _check_scheduler(name)
    except ValueError as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    levels = {
        name: {"t": [p.t for p in grid.points[:-1]], "sigma": [_level(schedule, p) for p in grid.points[:-1]]}
        for name, grid in drawn.items()
    }
    errors = _errors(names, budgets, schedule)
    publish(path, _figure(levels, errors, schedule, kind), overwrite)
    return {"path": str(path), "noise": noise, "steps": steps, "grids": levels, "errors": errors}


def _budget(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise UsageError(f"--nfe takes whole numbers from 1 to 1000 (got {text!r})")
    return int(text)


def _check_scheduler(name: str) -> None:
    """Raises UnknownName, or ValueError for one that has no error of this kind."""
    if name == "recommend":
        return
    solver = schedulers.info(name)
    if solver.stochastic or solver.native_only or solver.upwards:
        kind = "stochastic" if solver.stochastic else "native only" if solver.native_only else "no sampler"
        raise ValueError(f"{name} is {kind}: it has no error at a number of evaluations")


def _level(noise: NoiseSchedule, p: Any) -> float | None:
    """σ/α, or σ on a flow; None at pure noise."""
    level = noise.level(p)
    return level if math.isfinite(level) else None


def _errors(names: Sequence[str], budgets: Sequence[int], noise: NoiseSchedule) -> list[dict[str, Any]]:
    """Of each scheduler, at each budget of which it can use more than of the last."""
    from schedulers.exact import Exam, Mixture

    prediction = PREDICTION.get(noise.name, "epsilon")
    exam = Exam([Mixture.random(seed) for seed in MIXTURES], noise, prediction)
    rows: list[dict[str, Any]] = []
    for name in names:
        used = 0
        for budget in budgets:
            try:
                if name == "recommend":
                    s = schedulers.recommend(budget, noise=noise, prediction=prediction)
                else:
                    s = schedulers.get(name, noise=noise, prediction=prediction)
                steps = s.steps_for(budget)
                cost = s.nfe(steps)
            except ValueError:  # one step costs more, or the grid has no place for so many
                continue
            if cost > used:
                used = cost
                found = exam.errors(s.sample(exam.network, exam.x, steps))
                error = math.exp(sum(map(math.log, found)) / len(found))
                row = {"scheduler": name, "solver": s.name, "grid": s.grid_name, "nfe": cost, "steps": steps}
                rows.append(row | {"error": error if math.isfinite(error) else None})
    return rows


def _figure(
    levels: dict[str, dict[str, list[Any]]], errors: list[dict[str, Any]], noise: NoiseSchedule, kind: str
) -> bytes:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where its font cache is concerns nobody
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "diffgen"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(15, 4.8), layout="constrained")
        sigma, times, error = figure.subplots(1, 3)
        _draw_grids(sigma, times, levels)
        sigma.set(title=f"Noise level of each step ({noise.name})", ylabel=level_symbol(noise.name))
        sigma.set_yscale("linear" if level_symbol(noise.name) == "σ" else "log")
        times.set(title="Time of each step", ylabel="t")
        _draw_errors(error, errors)
        for axes in (sigma, times, error):
            axes.grid(alpha=0.25, linewidth=0.6)
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return picture.getvalue()


def _draw_grids(sigma: Any, times: Any, levels: dict[str, dict[str, list[Any]]]) -> None:
    for i, (name, points) in enumerate(levels.items()):
        steps = range(1, len(points["t"]) + 1)
        look = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 4, "linewidth": 1.2}
        sigma.plot(steps, [math.nan if level is None else level for level in points["sigma"]], **look)
        times.plot(steps, points["t"], label=name, **look)
    times.legend(**BESIDE, title="grid")
    for axes in (sigma, times):
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_errors(axes: Any, errors: list[dict[str, Any]]) -> None:
    for i, name in enumerate(dict.fromkeys(row["scheduler"] for row in errors)):
        rows = [row for row in errors if row["scheduler"] == name and row["error"] is not None]
        if not rows:
            continue
        best = name == "recommend"
        axes.plot(
            [row["nfe"] for row in rows],
            [row["error"] for row in rows],
            label=name if best else f"{rows[0]['solver']}, {rows[0]['grid']}",
            color="#000000" if best else COLOURS[i % 7],
            linewidth=2.2 if best else 1.2,
            marker=MARKERS[i % 7],
            markersize=4,
        )
    axes.set(title="Error on Gaussian mixtures", xlabel="evaluations", ylabel="distance to the exact solution (RMS)")
    axes.set(xscale="log", yscale="log")
    if errors:
        least, most = (pick(row["nfe"] for row in errors) for pick in (min, max))
        axes.set_xticks([n for n in TICKS if 0.7 * least <= n <= 1.3 * most])
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.legend(**BESIDE, title="scheduler, grid")
