"""diffgen schedulers: list, show and plot them."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

import schedulers
from diffgen.errors import UsageError
from schedulers import grids, prediction
from schedulers.explicit import is_grid_file
from schedulers.noise import level_symbol
from schedulers.recommend import advice
from schedulers.registry import Label, special_names
from schedulers.solver import Solver, evaluation_points

from .output import Debug, Json, Output, Quiet, printable, table

if TYPE_CHECKING:
    from diffgen.comparison import grid_plot

SEE = "list: diffgen schedulers list"
BUDGETS = "5,6,8,10,14,20,28,40,56,80"


def list_schedulers(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER",
            help="Show which fit this model.",
            show_default=False,
        ),
    ] = None,
    grids_only: Annotated[bool, typer.Option("--grids", help="List the grids: what each is, and its formula.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say = Output("schedulers list", json, quiet)
    if grids_only:
        if model is not None:
            raise UsageError("--grids lists grids, which fit every model: leave out --model")
        _list_grids(say, json)
        return
    solvers = [schedulers.info(name) for name in schedulers.names()]
    entries = [_entry(solver) for solver in solvers]
    rows = [["name", "order", "evaluations", "", "also known as"]]
    rows += [
        [s.name, str(s.order), str(s.evaluations_per_step), "stochastic" if s.stochastic else "", ", ".join(_labels(s))]
        for s in solvers
    ]
    if model is not None:
        from diffgen.loading import noise_and_prediction
        from diffgen.models.find import check, find

        target = find(model)
        noise, predicts = noise_and_prediction(target)
        embedded = not target.is_run and check(target).guidance_is_input
        rows[0].insert(4, f"with {target.name}")
        for solver, entry, row in zip(solvers, entries, rows[1:], strict=True):
            reason = "takes guidance as an input" if solver.cfg_pp and embedded else _why_not(solver, noise, predicts)
            entry |= {"compatible": reason is None, "reason": reason}
            row.insert(4, "yes" if reason is None else f"no: {reason}")
    for name, reason in schedulers.plugin_errors().items():
        say.warn(f"left out: {name}: {reason}")
    last = f"grids: {', '.join(schedulers.grid_names())}"
    if not json and sys.stdout.isatty():
        _print_table(rows, last)
    else:
        say.result({"schedulers": entries, "grids": schedulers.grid_names()}, [*table(rows), "", last])


def _list_grids(say: Output, json: bool) -> None:
    infos = [grids.describe(name) for name in schedulers.grid_names()]
    rows = [["name", "also known as", "points", "formula"]]
    rows += [[g.name, ", ".join(g.aliases), g.about, g.formula] for g in infos]
    last = "more: diffgen schedulers show NAME"
    if not json and sys.stdout.isatty():
        _print_table(rows, last)
    else:
        say.result({"grids": [asdict(info) for info in infos]}, [*table(rows), "", last])


def _entry(s: Solver) -> dict[str, Any]:
    return {
        "name": s.name,
        "aliases": list(s.aliases),
        "order": s.order,
        "evaluations_per_step": s.evaluations_per_step,
        "stochastic": s.stochastic,
        "native_only": s.native_only,
        "reference": s.reference,
        "options": s.options,
    }


def _labels(s: Solver) -> list[str]:
    """All other names of a solver, AUTOMATIC1111's first."""
    return [*([s.a1111] if s.a1111.lower() != s.name else []), *s.aliases]


def _why_not(solver: Solver, noise: schedulers.NoiseSchedule, predicts: str) -> str | None:
    """Why a solver does not work with a model of this noise schedule and prediction; None if it does."""
    if solver.native_only:
        return "it chooses its own times, so it only runs in the native loop"
    if solver.upwards:
        return "goes from a picture to noise"
    try:
        prediction.check(predicts, noise)
        evaluation_points(solver.function, grids.build(solver.grid_for(noise), noise, 4))
    except ValueError as error:
        return str(error)
    return None


def _print_table(rows: list[list[str]], last: str) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(*rows[0], header_style="bold", box=None, pad_edge=False)
    for row in rows[1:]:
        view.add_row(*map(printable, row))
    console = Console(color_system=None if os.environ.get("NO_COLOR") else "auto")
    console.print(view)
    console.print("\n" + printable(last), highlight=False)


def show(
    name: Annotated[
        str,
        typer.Argument(help="A scheduler or a grid, by its name here or in another tool: dpmpp_2m, “DPM++ 2M Karras”."),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", "--output", metavar="FILE", help="Draw it, as a .png or .svg file."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the grid. \\[10, or those of a grid file]", show_default=False)
    ] = None,
    noise: Annotated[
        str, typer.Option(metavar="NAME", help=f"Noise schedule; one of {', '.join(schedulers.NoiseSchedule.NAMES)}.")
    ] = "scaled_linear",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say = Output("schedulers show", json, quiet)
    try:
        label = schedulers.parse(name)
    except schedulers.UnknownName as error:
        try:
            grid = name if is_grid_file(name) else schedulers.check_grid(name)
        except schedulers.UnknownName as other:
            raise UsageError(_nearest(error, other), SEE) from error
        _show_grid(say, grid, out, steps, noise, overwrite)
    else:
        _show_solver(say, name, label, out, steps, noise, overwrite)


def _show_solver(
    say: Output, name: str, label: Label, out: str | None, steps: int | None, noise: str, overwrite: bool
) -> None:
    solver = schedulers.info(label.name)
    about = " ".join((solver.function.__doc__ or "").split())
    choices = {key: _choices(solver, key) for key in solver.options}
    result = {
        **_entry(solver),
        "about": about,
        "formula": solver.formula or None,
        "same_as": solver.same or None,
        "when": solver.when or None,
        "recommended": advice(solver.name) or None,
        "grid": solver.grid,
        "a1111": solver.a1111,
        "choices": {key: values for key, values in choices.items() if values},
        "implies": {"grid": label.grid, "options": label.options},
    }
    implied = [f"grid {label.grid}"] if label.grid else []
    implied += [f"{key} = {value!r}" for key, value in label.options.items()]
    kind = "stochastic: draws noise" if solver.stochastic else "deterministic"
    rows = [
        [solver.name, about],
        ["formula", solver.formula],
        ["order", f"{solver.order}; {kind}"],
        ["cost", _cost(solver)],
        ["grid", _default_grid(solver)],
        *(
            ["option", f"{key} = {default!r}{'; one of ' if choices[key] else ''}{', '.join(map(repr, choices[key]))}"]
            for key, default in solver.options.items()
        ),
        ["known as", ", ".join([*_labels(solver), *special_names(solver.name)])],
        ["same as", solver.same],
        ["use", solver.when],
        ["recommended", advice(solver.name)],
        ["source", solver.reference],
    ]
    if implied:
        rows.insert(1, [name, f"means here: {', '.join(implied)}"])
    if out is not None:
        names = [] if solver.unlike_the_ode else [solver.name]
        grid = label.grid or solver.grid_for(schedulers.NoiseSchedule.named(noise))
        _figures(out, names, grid, steps or 10, noise, overwrite)
        rows.append(["drawn", out])
        result["path"] = out
    say.result(result, _wrapped([row for row in rows if row[1]]))


def _show_grid(say: Output, name: str, out: str | None, steps: int | None, noise: str, overwrite: bool) -> None:
    if is_grid_file(name):
        from diffgen.generation.grid_files import check_grid

        tuned = grids.tuned(check_grid(name))
        steps = steps or tuned.steps
        info = grids.GridInfo(name, (), f"A grid file, tuned for {tuned.solver}, {tuned.steps} steps.", "", "")
    else:
        info = grids.describe(name.partition(":")[0])
    figures = _figures(out, [], name, steps or 10, noise, overwrite)
    levels = figures.grids[name]
    symbol = level_symbol(noise)
    rows = [
        [name, info.about],
        ["formula", info.formula],
        ["number", f"{info.parameter} = {info.default:g}; {info.name}:5 sets it to 5" if info.parameter else ""],
        ["known as", ", ".join(info.aliases)],
        ["source", info.reference],
        ["t", " ".join(f"{t:.4g}" for t in levels.t)],
        [symbol, " ".join("∞" if level is None else f"{level:.4g}" for level in levels.sigma)],
        ["", ""] if out is None else ["drawn", out],
    ]
    result = {**asdict(info), "noise": noise, "steps": figures.steps, **asdict(levels), "path": figures.path}
    say.result(result, _wrapped([row for row in rows if row[1]]))


def _figures(
    out: str | None, names: list[str], grid: str, steps: int, noise: str, overwrite: bool
) -> grid_plot.GridFigures:
    """The levels of a grid and the errors of solvers, drawn if there is a path."""
    from diffgen.comparison import grid_plot

    budgets = BUDGETS.split(",") if names else []
    if out is None:
        return grid_plot.grid_figures(names, [grid], steps, budgets, noise)
    return grid_plot.plot(Path(out), names, [grid], steps, budgets, noise, overwrite)


def _nearest(scheduler: schedulers.UnknownName, grid: schedulers.UnknownName) -> str:
    """The message with a suggestion, of what a name could mean: a scheduler or a grid."""
    return str(grid if "did you mean" in str(grid) and "did you mean" not in str(scheduler) else scheduler)


def _default_grid(solver: Solver) -> str:
    on_flows = solver.grid_for(schedulers.NoiseSchedule.flow())
    rule = f"{solver.grid}; {on_flows} on a schedule that begins at pure noise, such as a flow"
    return f"{solver.grid if on_flows == solver.grid else rule}; --grid chooses another"


def _choices(solver: Solver, option: str) -> list[Any]:
    hint = get_type_hints(solver.function)[option]
    return list(get_args(hint)) if get_origin(hint) is Literal else []


def _cost(solver: Solver) -> str:
    each = solver.evaluations_per_step
    return f"{each} evaluation{'s' * (each > 1)} a step{'; native loop only' * solver.native_only}"


def _wrapped(rows: list[list[str]]) -> Iterator[str]:
    """Two columns, the second wrapped to the width of a terminal; elsewhere one line for each row."""
    left = max(len(row[0]) for row in rows)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1_000_000
    for key, value in rows:
        first, *rest = textwrap.wrap(value, max(width - left - 2, 30)) or [""]
        yield f"{key.ljust(left)}  {first}"
        yield from (" " * (left + 2) + line for line in rest)


def plot(
    out: Annotated[
        str, typer.Option("--out", "-o", "--output", metavar="FILE", help="A .png or .svg file.")
    ] = "schedulers.png",
    names: Annotated[
        str,
        typer.Option(
            "--schedulers",
            metavar="A,B,…",
            help="Error curves to draw; recommend: the best for each budget.",
        ),
    ] = "euler,heun,dpmpp_2m,dpmpp_3m,unipc,recommend",
    grid_names: Annotated[
        str, typer.Option("--grids", metavar="A,B,…", help="Grids to draw.")
    ] = "trailing,karras,exponential,beta_t,kl_optimal,ays",
    steps: Annotated[int, typer.Option(help="Steps of the grids.")] = 10,
    nfe: Annotated[str, typer.Option(metavar="N,N,…", help="Numbers of evaluations to measure at.")] = BUDGETS,
    noise: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of {', '.join(schedulers.NoiseSchedule.NAMES)}.")
    ] = "scaled_linear",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    from diffgen.comparison import grid_plot

    figures = grid_plot.plot(
        Path(out),
        _split("--schedulers", names),
        _split("--grids", grid_names),
        steps,
        _split("--nfe", nfe),
        noise,
        overwrite,
    )
    Output("schedulers plot", json, quiet).result(asdict(figures), [figures.path or out])


def _split(option: str, text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError(f"{option} names nothing (got {text!r})")
    return names
