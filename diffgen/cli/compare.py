"""diffgen compare: schedulers side by side, at equal cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgen.errors import DiffgenError, UsageError

from .options import Device, Dtype, Offline, Wait
from .output import Debug, Json, Output, Quiet, UnfinishedError, printable, table, time_text
from .signals import first_signal

if TYPE_CHECKING:
    from diffgen.comparison.compare import Estimate
    from diffgen.comparison.results import Results

EXAMPLES = """
Examples:

  diffgen compare -m mixture --schedulers euler,heun,dpmpp_2m,unipc --nfe 5,10,20 --seeds 0-7 -o mixture/

  diffgen compare "a red apple" --schedulers dpmpp_2m,deis,euler_ancestral --nfe 6,12 --seeds 0-3 -o apples/

  diffgen compare -m runs/digits --schedulers all --nfe 10 --grids karras,trailing -o digits/

  diffgen compare --report apples/
"""

AXES, OUTPUT, MODEL = "Axes", "Output", "Model"

Prompts = Annotated[list[str] | None, typer.Argument(help="What to show, for a model that takes prompts.")]
Schedulers = Annotated[
    str, typer.Option(metavar="A,B,…|fast|all", help="Names from `schedulers list`.", rich_help_panel=AXES)
]
Budgets = Annotated[
    str, typer.Option("--nfe", metavar="N,…", help="Budgets of function evaluations.", rich_help_panel=AXES)
]
Seeds = Annotated[str, typer.Option(metavar="A-B|A,B,…", help="Seeds of the starting noises.", rich_help_panel=AXES)]
Grids = Annotated[
    str,
    typer.Option(metavar="NAME|FILE.json,…", help="Run each scheduler on each of these grids.", rich_help_panel=AXES),
]
Guidance = Annotated[
    str, typer.Option(metavar="X,…", help="Guidance scales; 1 is off. \\[the model's]", rich_help_panel=AXES)
]
Reference = Annotated[
    str,
    typer.Option(
        metavar="auto|none|SCHEDULER:NFE", help="The solution that errors are distances to.", rich_help_panel=AXES
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|FOLDER|RUN",
        help="Any model, or mixture: its exact solution is known. \\[emoji]",
        rich_help_panel=MODEL,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="The training data of a run, to measure its pictures against.", rich_help_panel=MODEL
    ),
]
Samples = Annotated[
    int, typer.Option(help="With --data: pictures of each scheduler at each budget.", rich_help_panel=MODEL)
]
Folder = Annotated[
    str | None,
    typer.Option("--out", "-o", "--output", metavar="FOLDER", help="The folder to write to.", rich_help_panel=OUTPUT),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue in a folder; finished cells are kept.", rich_help_panel=OUTPUT)
]
Report = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Write the page of a folder again, nothing else.", rich_help_panel=OUTPUT),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Count the cells and estimate the time, make nothing.", rich_help_panel=OUTPUT)
]


def compare(
    ctx: typer.Context,
    prompt: Prompts = None,
    schedulers: Schedulers = "fast",
    nfe: Budgets = "5,10,20",
    seeds: Seeds = "0-3",
    grids: Grids = "",
    guidance: Guidance = "",
    reference: Reference = "auto",
    model: Model = None,
    data: Data = None,
    samples: Samples = 500,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    out: Folder = None,
    resume: Resume = False,
    wait: Wait = False,
    report: Report = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    from diffgen.comparison import compare as comparison

    say = Output("compare", json, quiet)
    if report is not None:
        _refuse_others(ctx)
        path = comparison.rewrite_report(Path(report))
        say.result({"folder": str(Path(report)), "report": str(path)}, [str(path)])
        return
    options: dict[str, Any] = {
        "schedulers": schedulers, "nfe": nfe, "seeds": seeds, "grids": grids, "guidance": guidance,
        "reference": reference, "model": model, "data": data, "samples": samples, "device": device, "dtype": dtype,
        "offline": offline,
    }  # fmt: skip
    if dry_run:
        estimate = comparison.prepare(prompt or (), folder=Path(out or "comparison"), **options).estimate()
        _announce(say, estimate)
        counts = estimate.to_json()
        say.result(counts | {"dry_run": True}, [f"{name}\t{value}" for name, value in counts.items()])
        return

    def stop() -> bool:
        if stopped := first_signal() is not None:
            say.warn("interrupted: writing what is done; continue with --resume")
        return stopped

    with say.progress(model or "emoji") as on_step:
        results = comparison.compare(
            prompt or (),
            out=out,
            resume=resume,
            on_wait=say.warn if wait else None,
            on_start=lambda estimate: _announce(say, estimate),
            on_step=on_step,
            stop=stop,
            command=["diffgen", *sys.argv[1:]],
            **options,
        )
    _finish(say, results)


def _announce(say: Output, estimate: Estimate) -> None:
    """Print what is to be done, how long it takes, and the warnings."""
    from diffgen.comparison.tables import numbered

    counts = {"scheduler": estimate.entries, "budget": estimate.budgets, "seed": estimate.seeds, "cell": estimate.cells}
    parts = [numbered(count, name) for name, count in counts.items()]
    each = " or ".join(f"{1000 * seconds:.3g}" for seconds in estimate.seconds_each)
    say.note(
        f"{estimate.model}: {', '.join(parts)}, {estimate.unfinished} to do with their references, "
        f"{numbered(estimate.evaluations, 'evaluation')}, about {time_text(estimate.seconds)}"
        + (f" ({each} ms each)" if each else "")
    )
    if estimate.data_evaluations is not None and estimate.data_seconds is not None:
        most = time_text(estimate.data_seconds)
        say.note(f"--data: {estimate.data_evaluations} evaluations of single pictures, {most} at most")
    for warning in estimate.warnings:
        say.warn(warning)


def _finish(say: Output, results: Results) -> None:
    """Print the results. Raises UnfinishedError if something is missing."""
    from diffgen.comparison.tables import as_table, distribution_table
    from diffgen.comparison.verdict import failure

    content = results.to_json()
    del content["reference"]["starts"]
    names = ("cells", "rows", "reference", "distribution", "verdict", "seconds")
    result = {"folder": str(results.folder), "report": str(results.report)} | {name: content[name] for name in names}
    if not say.as_json:
        lines = [*table(list(as_table(results))), ""]
        if results.distribution is not None:
            lines += [*table(list(distribution_table(results.distribution))), ""]
        for line in [*lines, *results.verdict, str(results.report)]:
            say.line(printable(line))
    if error := DiffgenError("interrupted") if first_signal() else failure(results):
        raise UnfinishedError(error, result)
    if say.as_json:
        say.result(result)


def _refuse_others(ctx: typer.Context) -> None:
    """Raises UsageError if other options stand beside --report."""
    names = sorted(
        name
        for name in ctx.params.keys() - {"report", "json", "quiet", "debug"}
        if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
    )
    if names:
        options = ", ".join("a prompt" if name == "prompt" else f"--{name.replace('_', '-')}" for name in names)
        raise UsageError(f"--report writes the page again from stored results: it takes no {options}", "leave it out")
