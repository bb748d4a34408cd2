"""diffgen tune: learn at which times a solver evaluates a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device, Dtype, Offline
from .output import Debug, Json, Output, Quiet, table

if TYPE_CHECKING:
    from diffgen.comparison.tune import SearchStart

EXAMPLES = """
Examples:

  diffgen tune -m mixture --scheduler dpmpp_2m --nfe 5 -o mixture-5.json

  diffgen tune -m emoji --scheduler dpmpp_2m --nfe 8 --guidance 3 -o emoji-8.json

  diffgen generate "a red apple" --scheduler dpmpp_2m --guidance 3 --grid emoji-8.json
"""

SEARCH, OUTPUT, MODEL = "Search", "Output", "Model"
PRINTED = ("solver", "nfe", "guidance", "model", "error", "built_in", "ratio")  # the keys of the grid in --json


def tune(
    scheduler: Annotated[str, typer.Option(metavar="NAME", help="The solver, one that draws no noise.")],
    nfe: Annotated[int, typer.Option("--nfe", help="Function evaluations of the grid.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts to learn from. \\[drawn from the model's concepts]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the grid; 1 is off. \\[the model's]")
    ] = None,
    iterations: Annotated[
        int, typer.Option(help="At most so many gradients over all noises.", rich_help_panel=SEARCH)
    ] = 160,
    noises: Annotated[
        int, typer.Option(help="Starting noises to learn from: seeds 0, 1, …", rich_help_panel=SEARCH)
    ] = 32,
    batch_size: Annotated[
        int, typer.Option(help="Noises in one call of the network; more needs more memory.", rich_help_panel=SEARCH)
    ] = 8,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER|RUN|mixture",
            help="The model to tune for. \\[emoji]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", "--output", metavar="GRID.json", help="The file to write.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files.", rich_help_panel=OUTPUT)] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    from diffgen.comparison import tune as tuning

    say = Output("tune", json, quiet)
    with say.progress(model or "emoji") as on_step:
        grid = tuning.tune(
            prompt or (), scheduler=scheduler, nfe=nfe, out=out, model=model, guidance=guidance, iterations=iterations,
            noises=noises, batch_size=batch_size, device=device, dtype=dtype, offline=offline, overwrite=overwrite,
            on_start=lambda search: _announce(say, search), on_step=on_step,
        )  # fmt: skip
    assert grid.path is not None
    content = grid.to_json()
    result = {"grid": str(grid.path), "picture": str(grid.picture)} | {name: content[name] for name in PRINTED}
    errors = sorted(grid.built_in.all.items(), key=lambda item: item[1])[:5]
    rows = [["grid", "error on held-out noises"], [grid.path.name, f"{grid.error:.4g}"]]
    rows += [[name, f"{error:.4g}"] for name, error in errors]
    say.result(result, [*table(rows), str(grid.path), str(grid.picture)])


def _announce(say: Output, search: SearchStart) -> None:
    """Print what the search begins with, and the warnings."""
    say.note(
        f"{search.model}: {search.solver}, {search.nfe} evaluations, guidance {search.guidance:g}; "
        f"{search.noises} noises to learn from, {search.held_out} held out"
    )
    for warning in search.warnings:
        say.warn(warning)
