"""diffgen evaluate: how good a run is."""

from __future__ import annotations

import json as json_
import time
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from diffgen import environment
from diffgen.devices import device_name
from diffgen.errors import UsageError

from .output import Debug, Json, Output, Quiet, table

EXAMPLES = """
Examples:

  diffgen evaluate runs/digits --data digits

  diffgen evaluate runs/digits --data digits --guidance 2 --steps 10 -o with-guidance/

  diffgen evaluate runs/mine --data pictures/ --samples 200 -o neighbours.png
"""

SAMPLING, WHAT, OUTPUT = "Samples", "What is found", "Output"
SILENCE = 10.0  # seconds between two lines where no bar can be shown


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run of `diffgen train`.")],
    data: Annotated[str, typer.Option(metavar="DATA", help="What it was trained on: `digits`, or the folder.")],
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="\\[1000 with classes, else 500]", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Sample i has seed + i.", rich_help_panel=SAMPLING)] = 0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="\\[the run's]", rich_help_panel=SAMPLING)] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="X", help="1 is off. \\[the run's]", rich_help_panel=SAMPLING)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="See diffgen schedulers list. \\[the run's]", rich_help_panel=SAMPLING),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="At which times the model is asked.", rich_help_panel=SAMPLING),
    ] = None,
    bits: Annotated[
        bool, typer.Option("--bits/--no-bits", help="Bits per dimension by the bound.", rich_help_panel=WHAT)
    ] = True,
    ode: Annotated[
        bool, typer.Option("--ode", help="Also by the probability-flow ODE: slower.", rich_help_panel=WHAT)
    ] = False,
    any_data: Annotated[
        bool, typer.Option("--any-data", help="Take other data than the run's too.", rich_help_panel=WHAT)
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:N]|mps|xpu", help="Where to compute.", rich_help_panel=SAMPLING)
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Pictures at once. \\[by their size]", rich_help_panel=SAMPLING)
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            "--output",
            metavar="FILE.png|FOLDER",
            help="Samples beside their nearest training pictures; a folder gets the figures too.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say, device = Output("evaluate", json, quiet), device_name(device)
    picture_file, figures_file = _files(out, overwrite)
    from diffgen.training.evaluate_plan import make_evaluation_plan

    plan = make_evaluation_plan(
        run,
        samples=samples,
        seed=seed,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        grid=grid,
        batch_size=batch_size,
        any_data=any_data,
        bits=bits,
        ode=ode,
    )
    environment.prepare()
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries; ours are printed
    from diffgen.training.evaluate import Evaluation, data_of
    from diffgen.training.neighbours import neighbours

    with say.progress("reading pictures") as on_picture:
        pictures = data_of(plan, data, on_picture)
    for note in pictures.notes:
        say.note(note)
    evaluation = Evaluation(plan, pictures, device)
    say.note(
        f"{plan.run.name}: {len(plan)} samples, {plan.scheduler} on {plan.grid}, {plan.steps} steps, guidance "
        f"{plan.guidance:g}, seed {plan.seed}; {len(evaluation.real.test)} held-out pictures"
    )
    with say.progress(plan.run.name) as bar:
        result = evaluation.result(bar or _lines(say))
    for note in result["notes"]:
        say.warn(note)
    written = [str(file) for file in (picture_file, figures_file) if file is not None]
    result["files"] = written
    if picture_file is not None:
        image = BytesIO()
        neighbours(evaluation.real, evaluation.samples).save(image, "PNG")
        _write(picture_file, image.getvalue(), overwrite)
    if figures_file is not None:
        _write(figures_file, (json_.dumps(result, indent=1) + "\n").encode(), overwrite)
    say.result(result, [*table(list(_rows(result))), *_left_out(result), *written])


def _files(out: str | None, overwrite: bool) -> tuple[Path | None, Path | None]:
    """(the picture, the figures). Raises UsageError, CannotWrite before any work is done."""
    from diffgen.images.publish import Exists, cannot_write

    if out is None:
        return None, None
    path = Path(out)
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".json"):
        raise UsageError(f"-o must be a .png file or a folder (got {out!r})", "for example -o evaluation/")
    alone = path.suffix.lower() == ".png"
    picture, figures = (path, None) if alone else (path / "neighbours.png", path / "evaluation.json")
    for file in (picture, figures):
        if file is not None and file.exists() and (file.is_dir() or not overwrite):
            raise Exists(file)
    if alone and not path.parent.is_dir():
        raise cannot_write(path, FileNotFoundError(2, "no such folder"))
    if not alone and path.exists() and not path.is_dir():
        raise cannot_write(picture, NotADirectoryError(20, "not a folder"))
    return picture, figures


def _write(path: Path, data: bytes, overwrite: bool) -> None:
    from diffgen.images.publish import cannot_write, publish

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    publish(path, data, overwrite)


def _rows(result: dict[str, Any]) -> Iterator[list[str]]:
    yield ["metric", "value", "floor", "ceiling", "better"]
    for name, found in result["metrics"].items():
        deviation = result["floor_deviation"].get(name)
        floor = f"{found['floor']:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")
        yield [name, f"{found['value']:.4g}", floor, f"{found['ceiling']:.4g}", result["better"][name]]


def _left_out(result: dict[str, Any]) -> Iterator[str]:
    for name, why in result["left_out"].items():
        yield f"{name} is left out: {why}"


def _lines(say: Output) -> Callable[[int, int, str], None]:
    """Where no bar can be shown: a line for each part, and then now and then."""
    began, told, last = time.monotonic(), 0.0, ""

    def on_step(done: int, total: int, text: str) -> None:
        nonlocal told, last
        now = time.monotonic()
        if text != last or now - told >= SILENCE:
            left = f", about {(now - began) / done * (total - done):.0f} s left" if done else ""
            say.note(f"{text}{left}")
            told, last = now, text

    return on_step
