"""diffgen reproduce: make a picture again, and say whether the pixels are the same."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from diffgen import environment
from diffgen.devices import device_name
from diffgen.errors import InputError, InvalidOutput
from diffgen.generation.record import read_made
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
        typer.Option("--model", "-m", metavar="NAME|PATH|ID", help="Where it is not found by its recorded hash."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="What it was made from; may be repeated."),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="PATH", help="A LoRA, embedding, ControlNet, refiner or grid; may be repeated."),
    ] = None,
    device: RecordedDevice = None,
    offline: Offline = False,
    out: Annotated[
        str | None, typer.Option("--out", "-o", "--output", metavar="FILE", help="Where to write what is made.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    refuse_empty(locals(), {"file": "the file's name", "images": "--image", "files": "--file"})
    say = Output("reproduce", json, quiet)
    device = None if device is None else device_name(device)
    made = read_made(file)
    if made.tool != "diffgen":
        raise InputError(
            f"{file} was made with {TOOLS[made.tool]}: only pictures that diffgen made can be made again to the pixel",
            f"for a picture like it, try: {command_line(made)[0]}",
        )
    outputs = None if out is None else Outputs(out, 1, overwrite)
    environment.prepare(offline)
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries
    from diffgen.reproduce import reproduce as made_again

    with say.progress(file) as on_step:
        found = made_again(file, model, [*(images or []), *(files or [])], device, on_step)
    result = {
        "identical": found.identical,
        "max_difference": found.max_difference,
        "differing_pixels": found.differing_pixels,
        "reason": found.reason,
    }
    if outputs is not None:
        with uninterrupted():
            result["path"] = str(outputs.write(
                encode_png(found.image, found.record),
                seed=found.record["seed"],
                prompt=found.record["prompt"],
                model=found.record["model"],
                scheduler=found.record["scheduler"],
                steps=found.record["steps"],
            ))  # fmt: skip
            say.note(f"written: {result['path']}")
    if found.identical:
        say.result(result, ["identical pixels"])
        return
    if found.differing_pixels is None:
        far = "another size"
    else:
        total = found.image.width * found.image.height
        far = f"{found.differing_pixels} of {total} pixels differ, by at most {found.max_difference} of 255"
    raise UnfinishedError(InvalidOutput(f"{file} is not reproduced: {far}", found.reason or ""), result)
