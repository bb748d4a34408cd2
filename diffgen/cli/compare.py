"""diffgen compare: schedulers side by side, at equal cost."""

from __future__ import annotations

import json as json_
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import CannotWrite, DiffgenError, InputError, UsageError
from diffgen.generation.checks import check_int

from .options import Device, Dtype, Offline
from .output import Debug, Json, Output, Quiet, UnfinishedError, printable, table, time_text
from .signals import first_signal

if TYPE_CHECKING:
    from diffgen.comparison.distribution import Distribution
    from diffgen.comparison.run import Comparison

EXAMPLES = """
Examples:

  diffgen compare -m mixture --schedulers euler,heun,dpmpp_2m,unipc --nfe 5,10,20 --seeds 0-7 -o mixture/

  diffgen compare "a red apple" --schedulers dpmpp_2m,deis,euler_ancestral --nfe 6,12 --seeds 0-3 -o apples/

  diffgen compare -m runs/digits --schedulers all --nfe 10 --grids karras,trailing -o digits/

  diffgen compare --report apples/
"""

AXES, OUTPUT, MODEL = "Axes", "Output", "Model"
ALL = (
    "euler,heun,dpm2,dpmpp_2m,dpmpp_2s,dpmpp_3m,deis,unipc,lms,ipndm,res_multistep,pndm,"
    "euler_ancestral,dpmpp_2m_sde,dpmpp_sde,ddpm"
)
FAST = "euler,dpmpp_2m,deis,unipc"
SETS = {"all": ALL, "fast": FAST}


def compare(
    ctx: typer.Context,
    prompt: Annotated[list[str] | None, typer.Argument(help="What to show, for a model that takes prompts.")] = None,
    schedulers: Annotated[
        str,
        typer.Option(metavar="A,B,…|fast|all", help="Names that `schedulers list` knows.", rich_help_panel=AXES),
    ] = "fast",
    nfe: Annotated[
        str, typer.Option("--nfe", metavar="N,…", help="Budgets of function evaluations.", rich_help_panel=AXES)
    ] = "5,10,20",
    seeds: Annotated[str, typer.Option(metavar="A-B|A,B,…", help="Starting noises.", rich_help_panel=AXES)] = "0-3",
    grids: Annotated[
        str, typer.Option(metavar="NAME|FILE.json,…", help="Each scheduler on each.", rich_help_panel=AXES)
    ] = "",
    guidance: Annotated[
        str, typer.Option(metavar="X,…", help="Guidance scales; 1 is off. \\[the model's]", rich_help_panel=AXES)
    ] = "",
    reference: Annotated[
        str,
        typer.Option(
            metavar="auto|none|SCHEDULER:NFE", help="The solution that errors are distances to.", rich_help_panel=AXES
        ),
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER|RUN",
            help="Any model, or mixture: its exact answer is known. \\[emoji]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="What a run was trained on: measure its pictures against it.", rich_help_panel=MODEL
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="With --data: pictures of each scheduler at each budget.", rich_help_panel=MODEL)
    ] = 500,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", "--output", metavar="FOLDER", help="Where to write.", rich_help_panel=OUTPUT),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a folder; what is done stays.", rich_help_panel=OUTPUT)
    ] = False,
    report: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Make the page again, nothing else.", rich_help_panel=OUTPUT),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count and time, make nothing.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say = Output("compare", json, quiet)
    if report is not None:
        _alone(ctx)
        _report(say, Path(report))
        return
    device, dtype = device_name(device), dtype_name(dtype)
    from diffgen.comparison import plan

    labels = [label.strip() for label in SETS.get(schedulers, schedulers).split(",") if label.strip()]
    entries = plan.parse_entries(labels, [grid.strip() for grid in grids.split(",") if grid.strip()])
    budgets, seed_list = plan.parse_budgets(nfe), plan.parse_seeds(seeds)
    scales = plan.parse_guidance(guidance) if guidance else ()
    check_int("--samples", samples, 2, 100_000)
    if data is not None and (model is None or model == "mixture"):
        raise UsageError("--data is for a training run, which -m names")
    folder = _folder(out, resume, dry_run)

    environment.prepare(offline)
    from diffgen.comparison.results import results
    from diffgen.comparison.run import Comparison, Reference
    from diffgen.comparison.subjects import RunSubject, subject_of
    from diffgen.comparison.tables import as_table, distribution_table
    from diffgen.comparison.verdict import missing

    subject, prompts, scales = subject_of(model, prompt or [], scales, device, dtype)
    aim = Reference.parse(reference, exact=subject.is_mixture)
    axes = plan.Axes(entries, budgets, seed_list, prompts, scales)
    comparison = Comparison(subject, axes, aim, folder)
    distribution = None
    if data is not None:
        if not isinstance(subject, RunSubject):
            raise UsageError(f"--data is for a training run, and {subject.name} is none")
        from diffgen.comparison.distribution import Distribution

        distribution = Distribution(comparison, data, samples)
    if not dry_run:
        _make(folder)
    counted = _tell(say, comparison, distribution)
    if dry_run:
        say.result(counted | {"dry_run": True}, [f"{name}\t{value}" for name, value in counted.items()])
        return
    began, measured = time.perf_counter(), None
    try:
        with say.progress(subject.name) as on_step:
            for _ in comparison.make(on_step):
                if first_signal():
                    break
        if distribution is not None and not first_signal():
            with say.progress(f"{subject.name}: {samples} pictures of each") as on_step:
                measured = distribution.result(on_step)
    except BaseException:
        if not first_signal():
            raise
    if first_signal():
        say.note("interrupted: writing what is done; go on with --resume")
    found = results(comparison, _command(), round(time.perf_counter() - began, 3), measured)
    _store(folder, found)
    result = {
        "folder": str(folder),
        "report": str(folder / "report.html"),
        "cells": found["cells"],
        "rows": found["rows"],
        "reference": {k: v for k, v in found["reference"].items() if k != "starts"},
        "distribution": found["distribution"],
        "verdict": found["verdict"],
        "seconds": found["seconds"],
    }
    if not json:
        lines = [*table(list(as_table(found))), ""]
        if measured is not None:
            lines += [*table(list(distribution_table(found))), ""]
        for line in [*lines, *found["verdict"], str(folder / "report.html")]:
            say.line(printable(line))
    if lacks := "interrupted" if first_signal() else missing(found):
        error = DiffgenError(lacks)
        if len(comparison.codes) == 1:  # all failed alike
            (error.code,) = comparison.codes
        raise UnfinishedError(error, result)
    if json:
        say.result(result)


def _tell(say: Output, comparison: Comparison, distribution: Distribution | None) -> dict[str, Any]:
    """What is to be done and how long it takes, said before it begins; the counts, for --json."""
    from diffgen.comparison.tables import numbered

    axes, waiting = comparison.axes, comparison.waiting()
    each = comparison.warm_up() if waiting or distribution is not None else {}
    seconds = sum(each[job.guidance] * job.nfe for job in waiting)
    evaluations = sum(job.nfe for job in waiting)
    counted: dict[str, Any] = {
        "cells": len(comparison.cells),
        "impossible": len(comparison.failures),
        "to_do": len(waiting),
        "evaluations": evaluations,
        "seconds_estimated": round(seconds, 3),
    }
    said = {"scheduler": axes.entries, "budget": axes.budgets, "seed": axes.seeds, "cell": comparison.cells}
    parts = [numbered(len(values), name) for name, values in said.items()]
    say.note(
        f"{comparison.subject.name}: {', '.join(parts)}, {len(waiting)} to do with their references, "
        f"{numbered(evaluations, 'evaluation')}, about {time_text(seconds)}"
        + (f" ({' or '.join(f'{1000 * one:.3g}' for one in each.values())} ms each)" if each else "")
    )
    if distribution is not None:  # pictures asked about in batches: each takes a single evaluation's time at most
        asked = [(distribution.samples * nfe, guidance) for *_, nfe, guidance in distribution.settings()]
        counted["data_evaluations"] = more = sum(count for count, _ in asked)
        at_most = sum(each[guidance] * count for count, guidance in asked)
        counted["seconds_estimated"] = round(seconds + at_most, 3)
        say.note(f"--data: {more} evaluations of single pictures, {time_text(at_most)} at most")
    for reason in dict.fromkeys(comparison.failures.values()):
        count = sum(reason == other for other in comparison.failures.values())
        say.warn(f"{numbered(count, 'cell')} cannot be made: {reason}")
    for note in comparison.notes():
        say.warn(note)
    return counted


def _store(folder: Path, found: dict[str, Any]) -> None:
    """The results as data, as a page and as a picture."""
    from io import BytesIO

    from diffgen.comparison.report import page
    from diffgen.comparison.sheet import sheet
    from diffgen.comparison.tables import as_csv

    _write(folder, "results.json", json_.dumps(found, indent=1, allow_nan=False).encode())
    _write(folder, "results.csv", as_csv(found).encode())
    _write(folder, "report.html", page(found, folder).encode())
    image = BytesIO()
    sheet(found, folder).save(image, "PNG")
    _write(folder, "grid.png", image.getvalue())


def _folder(out: str | None, resume: bool, dry_run: bool) -> Path:
    """The folder to write to, which need not be there yet. Raises UsageError, CannotWrite."""
    if out is None:
        if not dry_run:
            raise UsageError("a comparison needs a folder to write to", "add -o FOLDER")
        return Path("comparison")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise CannotWrite(f"cannot write to {out}: it is a file", "choose another -o")
    if not resume and not dry_run and folder.is_dir() and any(folder.iterdir()):
        raise CannotWrite(f"cannot write to {out}: it is not empty", "go on there with --resume, or choose another -o")
    return folder


def _make(folder: Path) -> None:
    """Raises CannotWrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        from diffgen.images.publish import cannot_write

        raise cannot_write(folder, error) from error


def _write(folder: Path, name: str, data: bytes) -> None:
    from diffgen.images.publish import publish

    publish(folder / name, data, overwrite=True)


def _alone(ctx: typer.Context) -> None:
    """Nothing but --report was asked for. Raises UsageError."""
    others = ctx.params.keys() - {"report", "json", "quiet", "debug"}
    given = sorted(
        name for name in others if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
    )
    if given:
        named = ", ".join("a prompt" if name == "prompt" else f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"--report makes the page again from what is stored: {named} is not for it", "leave it out")


def _report(say: Output, folder: Path) -> None:
    """The page again, from what is stored."""
    from jinja2 import TemplateError

    from diffgen.comparison.report import page
    from diffgen.models.gate import read_json

    if not (folder / "results.json").is_file():
        raise InputError(
            f"{folder} holds no comparison: no results.json is there", "make one: diffgen compare -o FOLDER"
        )
    found: dict[str, Any] = read_json(folder / "results.json", MAX_RESULTS)
    if found.get("schema") != "diffgen.compare/1":
        raise InputError(f"{folder / 'results.json'}: no comparison of this version (schema {found.get('schema')!r})")
    try:
        html = page(found, folder)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, TemplateError) as error:
        raise InputError(f"{folder}: damaged: {type(error).__name__}: {error}") from error
    _write(folder, "report.html", html.encode())
    path = str(folder / "report.html")
    say.result({"folder": str(folder), "report": path}, [path])


MAX_RESULTS = 256 << 20


def _command() -> str:
    """What was typed."""
    return shlex.join(["diffgen", *sys.argv[1:]])
