"""Draw grids and the errors of schedulers: the picture of `diffgen schedulers plot`.

`measure` computes the figures, `figure` draws them, and `plot` does both and writes the file.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import schedulers
from diffgen.errors import UsageError
from diffgen.generation.grid_files import check_grid
from diffgen.images.publish import Exists, check_writable, publish
from schedulers import NoiseSchedule, grids
from schedulers.noise import level_symbol

MIXTURES = range(4)  # seeds: six components of deviation 0.6 in four dimensions each
PREDICTION = {"cosine": "v_prediction", "flow": "flow_prediction"}  # epsilon elsewhere; the exact solution is the same
# Okabe and Ito's colours, which colour-blind people can distinguish; black is for `recommend`
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osD^vPX"
BESIDE: Any = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "frameon": False, "alignment": "left"}
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Levels:
    """The times and noise levels of a grid: σ/α, or σ for a flow; None at pure noise."""

    t: tuple[float, ...]
    sigma: tuple[float | None, ...]


@dataclass(frozen=True)
class ErrorPoint:
    """The error of a scheduler at a number of evaluations: a root-mean-square distance, None if it is not finite."""

    scheduler: str  # as requested, "recommend" too
    solver: str
    grid: str
    nfe: int
    steps: int
    error: float | None


@dataclass(frozen=True)
class GridFigures:
    """What a plot of grids shows."""

    path: str | None  # of the picture
    noise: str
    steps: int
    grids: dict[str, Levels]
    errors: tuple[ErrorPoint, ...]


def plot(
    path: Path,
    names: Sequence[str],
    grid_names: Sequence[str],
    steps: int,
    nfe: Sequence[str],
    noise: str,
    overwrite: bool = False,
) -> GridFigures:
    """Measure, draw and write a .png or .svg; see `grid_figures`.

    Raises UsageError for the arguments, InputError for a grid file, CannotWrite for the path.
    """
    kind = path.suffix.lower()[1:]
    if kind not in ("png", "svg"):
        raise UsageError(f"-o must end in .png or .svg (got {str(path)!r})")
    if path.exists() and not overwrite:
        raise Exists(path)
    check_writable(path)
    figures = replace(grid_figures(names, grid_names, steps, nfe, noise), path=str(path))
    publish(path, draw_grids(figures, kind), overwrite)
    return figures


def grid_figures(
    names: Sequence[str], grid_names: Sequence[str], steps: int, nfe: Sequence[str], noise: str
) -> GridFigures:
    """The levels of grids at `steps`, and the errors of schedulers at numbers of evaluations.

    The errors are distances to the exact solution on Gaussian mixtures. Raises UsageError, InputError for a grid file.
    """
    if not 1 <= steps <= 1000:
        raise UsageError(f"--steps must be a whole number from 1 to 1000 (got {steps})")
    budgets = sorted({_budget(text) for text in nfe})
    try:
        schedule = NoiseSchedule.named(noise)
        built = {name: grids.build(check_grid(name), schedule, steps).points[:-1] for name in grid_names}
        for name in names:
            _check_scheduler(name)
    except ValueError as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    levels = {
        name: Levels(tuple(p.t for p in points), tuple(_level(schedule, p) for p in points))
        for name, points in built.items()
    }
    return GridFigures(None, schedule.name, steps, levels, tuple(_errors(names, budgets, schedule)))


def _budget(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise UsageError(f"--nfe takes whole numbers from 1 to 1000 (got {text!r})")
    return int(text)


def _check_scheduler(name: str) -> None:
    """Raises UnknownName, and ValueError for a solver without an error at a number of evaluations."""
    if name == "recommend":
        return
    solver = schedulers.info(name)
    if solver.unlike_the_ode:
        raise ValueError(f"{name} {solver.unlike_the_ode}: it has no error at a number of evaluations")


def _level(noise: NoiseSchedule, p: Any) -> float | None:
    """The noise level of a point; None at pure noise."""
    level = noise.level(p)
    return level if math.isfinite(level) else None


def _errors(names: Sequence[str], budgets: Sequence[int], noise: NoiseSchedule) -> Iterator[ErrorPoint]:
    """The error of each scheduler, at each budget that allows more evaluations than the one before."""
    from schedulers.exact import Exam, Mixture

    prediction = PREDICTION.get(noise.name, "epsilon")
    exam = Exam([Mixture.random(seed) for seed in MIXTURES], noise, prediction)
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
            except ValueError:  # one step takes more, or the grid has no room for so many steps
                continue
            if cost > used:
                used = cost
                errors = exam.errors(s.sample(exam.network, exam.x, steps))
                error = math.exp(sum(map(math.log, errors)) / len(errors))
                finite = error if math.isfinite(error) else None
                yield ErrorPoint(name, s.name, s.grid_name, cost, steps, finite)


def draw_grids(figures: GridFigures, kind: str) -> bytes:
    """The picture as a file of the kind png or svg."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # silence messages about its font cache
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "diffgen"}
    with matplotlib.rc_context(style):
        panels = 3 if figures.errors else 2
        drawing = Figure(figsize=(5 * panels, 4.8), layout="constrained")
        sigma, times, *error = drawing.subplots(1, panels)
        symbol = level_symbol(figures.noise)
        _draw_grids(sigma, times, figures.grids)
        sigma.set(title=f"Noise level of each step ({figures.noise})", ylabel=symbol)
        sigma.set_yscale("linear" if symbol == "σ" else "log")
        times.set(title="Time of each step", ylabel="t")
        for axes in error:
            _draw_errors(axes, figures.errors)
        for axes in (sigma, times, *error):
            axes.grid(alpha=0.25, linewidth=0.6)
        picture = io.BytesIO()
        drawing.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return picture.getvalue()


def _draw_grids(sigma: Any, times: Any, levels: dict[str, Levels]) -> None:
    for i, (name, points) in enumerate(levels.items()):
        steps = range(1, len(points.t) + 1)
        look = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 4, "linewidth": 1.2}
        sigma.plot(steps, [math.nan if level is None else level for level in points.sigma], **look)
        times.plot(steps, points.t, label=name, **look)
    times.legend(**BESIDE, title="grid")
    for axes in (sigma, times):
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_errors(axes: Any, errors: Sequence[ErrorPoint]) -> None:
    for i, name in enumerate(dict.fromkeys(point.scheduler for point in errors)):
        points = [point for point in errors if point.scheduler == name and point.error is not None]
        if not points:
            continue
        best = name == "recommend"
        axes.plot(
            [point.nfe for point in points],
            [point.error for point in points],
            label=name if best else f"{points[0].solver}, {points[0].grid}",
            color="#000000" if best else COLOURS[i % 7],
            linewidth=2.2 if best else 1.2,
            marker=MARKERS[i % 7],
            markersize=4,
        )
    axes.set(title="Error on Gaussian mixtures", xlabel="evaluations", ylabel="distance to the exact solution (RMS)")
    axes.set(xscale="log", yscale="log")
    least, most = (limit(point.nfe for point in errors) for limit in (min, max))
    axes.set_xticks([n for n in TICKS if 0.7 * least <= n <= 1.3 * most])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(**BESIDE, title="scheduler, grid")
