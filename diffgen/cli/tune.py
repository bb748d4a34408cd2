"""diffgen tune: learn at which times a solver should ask a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import UsageError
from diffgen.generation.checks import check_int

from .options import Device, Dtype, Offline
from .output import Debug, Json, Output, Quiet, table

EXAMPLES = """
Examples:

  diffgen tune -m mixture --scheduler dpmpp_2m --nfe 5 -o mixture-5.json

  diffgen tune -m emoji --scheduler dpmpp_2m --nfe 8 --guidance 3 -o emoji-8.json

  diffgen generate "a red apple" --scheduler dpmpp_2m --guidance 3 --grid emoji-8.json
"""

SEARCH, OUTPUT, MODEL = "Search", "Output", "Model"


def tune(
    scheduler: Annotated[str, typer.Option(metavar="NAME", help="The solver, one that draws no noise.")],
    nfe: Annotated[int, typer.Option("--nfe", help="Function evaluations that the grid is for.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts to learn from. \\[drawn from what the model says it knows]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="The guidance scale that it is for; 1 is off. \\[the model's]")
    ] = None,
    iterations: Annotated[
        int, typer.Option(help="At most so many gradients over all noises.", rich_help_panel=SEARCH)
    ] = 160,
    noises: Annotated[
        int, typer.Option(help="Starting noises to learn from, seeds 0, 1, …", rich_help_panel=SEARCH)
    ] = 32,
    batch_size: Annotated[
        int, typer.Option(help="Noises in one call of the network; more needs more memory.", rich_help_panel=SEARCH)
    ] = 8,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME|FOLDER|RUN|mixture", help="\\[emoji]", rich_help_panel=MODEL),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", "--output", metavar="GRID.json", help="Where to write.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files.", rich_help_panel=OUTPUT)] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    say = Output("tune", json, quiet)
    device, dtype = device_name(device), dtype_name(dtype)
    from diffgen.comparison import plan

    entry = plan.parse_entries([scheduler])[0]
    if entry.stochastic:
        raise UsageError(f"--scheduler {scheduler} draws noise on the way: it has no solution to come nearer to")
    check_int("--nfe", nfe, 1, 100)
    if guidance is not None:
        plan.parse_guidance(str(guidance))
    check_int("--iterations", iterations, 1, 100_000)
    check_int("--noises", noises, 1, plan.SEEDS_BELOW - plan.HELD_OUT)
    check_int("--batch-size", batch_size, 1, plan.SEEDS_BELOW)
    path, picture_path = _paths(out, overwrite)

    environment.prepare(offline)
    from diffgen.comparison.subjects import subject_of
    from diffgen.comparison.tune import Settings, as_json, tune
    from diffgen.comparison.tune_plot import picture
    from diffgen.images.publish import publish

    asked = [] if guidance is None else [guidance]
    subject, prompts, (scale, *_) = subject_of(model, prompt or [], asked, device, dtype, drawn=plan.SEEDS_BELOW)

    def prompt_of(seed: int) -> str:
        return prompts[seed % len(prompts)]

    settings = Settings(iterations=iterations, noises=noises, batch=batch_size)
    say.note(
        f"{subject.name}: {entry.scheduler}, {nfe} evaluations, guidance {scale:g}; "
        f"{settings.noises} noises to learn from, {settings.held_out} held out"
    )
    for note in subject.remarks:
        say.warn(note)
    with say.progress(f"{subject.name}, {entry.scheduler}, {nfe} evaluations") as on_step:
        try:
            found = tune(subject, scheduler, nfe, prompt_of, scale, settings, on_step)
        except ValueError as error:
            raise UsageError(str(error)) from error
    shown = picture(subject, found, prompt_of)
    publish(path, as_json(found).encode(), overwrite)
    publish(picture_path, shown, overwrite)
    result = {
        "grid": str(path),
        "picture": str(picture_path),
        **{key: found[key] for key in ("solver", "nfe", "guidance", "model", "error", "built_in", "ratio")},
    }
    rows = [["grid", "error on held-out noises"], [path.name, f"{found['error']:.4g}"]]
    rows += [[n, f"{e:.4g}"] for n, e in sorted(found["built_in"]["all"].items(), key=lambda item: item[1])[:5]]
    say.result(result, [*table(rows), str(path), str(picture_path)])


def _paths(out: str | None, overwrite: bool) -> tuple[Path, Path]:
    """The grid file, and the picture beside it. Raises UsageError, CannotWrite."""
    if out is None:
        raise UsageError("a grid needs a file to be written to", "add -o GRID.json")
    path = Path(out)
    if path.suffix.lower() != ".json":
        raise UsageError(f"-o must end in .json (got {out!r}): grids are known by that", "for example -o grid.json")
    from diffgen.images.publish import Exists, cannot_write

    for file in (path, path.with_suffix(".png")):
        if file.exists() and not overwrite:
            raise Exists(file)
    if not path.parent.is_dir():
        raise cannot_write(path, FileNotFoundError(2, "no such folder"))
    return path, path.with_suffix(".png")
