"""diffgen reproduce: make a picture again and compare the pixels."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from diffgen import environment
from diffgen.devices import device_name
from diffgen.errors import InputError, InvalidOutput
from diffgen.generation.record import read_picture_info
from diffgen.images.metadata import encode_png
from diffgen.images.naming import Outputs

from .inspect import TOOLS, command_line
from .options import Offline, RecordedDevice
from .output import Debug, Json, Output, Quiet, UnfinishedError, refuse_empty
from .signals import uninterrupted

EXAMPLES = """
Examples:

  diffgen reproduce apple.png

  diffgen reproduce apple.png -m some/diffusers/folder --image drawing.png -o again.png
"""


def reproduce(
    file: Annotated[str, typer.Argument(help="A picture that diffgen made.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME|PATH|ID", help="Model, if its recorded hash is not found."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="Image it was made from; may be repeated."),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="PATH", help="LoRA, embedding, ControlNet, refiner or grid; may be repeated."),
    ] = None,
    device: RecordedDevice = None,
    offline: Offline = False,
    out: Annotated[
        str | None, typer.Option("--out", "-o", "--output", metavar="FILE", help="Image file to write. \\[none]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    refuse_empty(locals(), {"file": "the file's name", "images": "--image", "files": "--file"})
    say = Output("reproduce", json, quiet)
    device = None if device is None else device_name(device)
    source = read_picture_info(file)
    if source.tool != "diffgen":
        raise InputError(
            f"{file} was made with {TOOLS[source.tool]}: only pictures of diffgen can be reproduced to the pixel",
            f"for a picture like it, try: {command_line(source)[0]}",
        )
    outputs = None if out is None else Outputs(out, 1, overwrite)
    environment.prepare(offline)
    if not debug:
        warnings.simplefilter("ignore")  # warnings of the libraries
    from diffgen.reproduce import reproduce as make_again

    with say.progress(file) as on_step:
        outcome = make_again(file, model, [*(images or []), *(files or [])], device, on_step)
    result = {
        "identical": outcome.identical,
        "max_difference": outcome.max_difference,
        "differing_pixels": outcome.differing_pixels,
        "reason": outcome.reason,
    }
    if outputs is not None:
        with uninterrupted():
            result["path"] = str(outputs.write(
                encode_png(outcome.image, outcome.record),
                seed=outcome.record["seed"],
                prompt=outcome.record["prompt"],
                model=outcome.record["model"],
                scheduler=outcome.record["scheduler"],
                steps=outcome.record["steps"],
            ))  # fmt: skip
            say.note(f"written: {result['path']}")
    if outcome.identical:
        say.result(result, ["identical pixels"])
        return
    if outcome.differing_pixels is None:
        difference = "another size"
    else:
        total = outcome.image.width * outcome.image.height
        difference = f"{outcome.differing_pixels} of {total} pixels differ, by at most {outcome.max_difference} of 255"
    raise UnfinishedError(InvalidOutput(f"{file} is not reproduced: {difference}", outcome.reason or ""), result)
