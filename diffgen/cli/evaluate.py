"""diffgen evaluate: how good a run is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

import diffgen
from diffgen.training.listener import Listener

from .options import Device
from .output import Debug, Json, Output, Quiet, table

EXAMPLES = """
Examples:

  diffgen evaluate runs/digits --data digits

  diffgen evaluate runs/digits --data digits --guidance 2 --steps 10 -o with-guidance/

  diffgen evaluate runs/mine --data pictures/ --samples 200 -o neighbours.png
"""

SAMPLING, WHAT, OUTPUT = "Samples", "Metrics", "Output"
SILENCE = 10.0  # seconds between two lines where there is no bar


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run of `diffgen train` or `finetune`.")],
    data: Annotated[str, typer.Option(metavar="DATA", help="The data of the run: `digits`, or a folder.")],
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
        typer.Option(metavar="NAME|FILE", help="The times at which the model is evaluated.", rich_help_panel=SAMPLING),
    ] = None,
    bits: Annotated[
        bool, typer.Option("--bits/--no-bits", help="Bits per dimension by the bound.", rich_help_panel=WHAT)
    ] = True,
    ode: Annotated[
        bool, typer.Option("--ode", help="Also by the probability-flow ODE (slower).", rich_help_panel=WHAT)
    ] = False,
    any_data: Annotated[
        bool, typer.Option("--any-data", help="Accept other data than the run's.", rich_help_panel=WHAT)
    ] = False,
    device: Device = "auto",
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
            help="Samples with their nearest training pictures; a folder also gets the figures.",
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
    say = Output("evaluate", json, quiet)
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries; ours are printed
    with say.progress("evaluate") as bar:
        result = diffgen.evaluate(
            run,
            data,
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
            out=out,
            overwrite=overwrite,
            device=device,
            listener=EvaluationScreen(say, bar),
        )
    document = asdict(result)
    missing = [f"{name} is left out: {reason}" for name, reason in result.left_out.items()]
    say.result(document, [*table(list(_rows(document))), *missing, *document.get("files", [])])


def _rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The table of the metrics."""
    yield ["metric", "value", "floor", "ceiling", "better"]
    for name, figures in result["metrics"].items():
        deviation = result.get("floor_deviation", {}).get(name)
        floor = f"{figures['floor']:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")
        yield [name, f"{figures['value']:.4g}", floor, f"{figures['ceiling']:.4g}", result["better"][name]]


class EvaluationScreen(Listener):
    """Shows an evaluation: a bar on a terminal; elsewhere a line for each stage, and then now and then."""

    def __init__(self, say: Output, bar: Callable[..., None] | None) -> None:
        self.note, self.warn, self.bar = say.note, say.warn, bar  # type: ignore[method-assign]
        self.began, self.last_line, self.last_text = time.monotonic(), 0.0, ""

    def progress(self, done: int, total: int, text: str) -> None:
        if self.bar is not None:
            self.bar(done, total, text)
            return
        now = time.monotonic()
        if text != self.last_text or now - self.last_line >= SILENCE:
            left = f", about {(now - self.began) / done * (total - done):.0f} s left" if done else ""
            self.note(f"{text}{left}")
            self.last_line, self.last_text = now, text
