"""diffgen inspect: how a picture was made, by what its file says, and the command that does the same here."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any

import typer

from diffgen.errors import InputError
from diffgen.generation.record import read_made
from diffgen.images.readers.command import command
from diffgen.images.readers.made import Made
from diffgen.models.find import DEFAULT, bundled_names, find

from .output import Debug, Json, Output, Quiet, refuse_empty

EXAMPLES = """
Examples:

  diffgen inspect apple.png

  diffgen inspect from-comfyui.png --json
"""

TOOLS = {
    "diffgen": "diffgen",
    "a1111": "AUTOMATIC1111 or Forge",
    "comfyui": "ComfyUI",
    "invokeai": "InvokeAI",
    "sdcpp": "stable-diffusion.cpp",
    "kohya": "kohya's sd-scripts",
    "mflux": "mflux",
    "fooocus": "Fooocus",
    "novelai": "NovelAI",
}
SAID = ("tool", "prompt", "negative", "seed", "steps", "guidance", "scheduler", "grid", "width", "height", "model")


def inspect(
    file: Annotated[str, typer.Argument(help="A PNG, JPEG or WebP picture of this or another tool.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    refuse_empty({"file": file}, {"file": "the file's name"})
    say = Output("inspect", json, quiet)
    made = read_made(file)
    line, notes = command_line(made)
    for note in notes:
        say.note(f"note: {note}")
    result = {key: getattr(made, key) for key in SAID} | {"command": line, "notes": notes}
    say.result(result, _lines(result))


def command_line(made: Made) -> tuple[str, list[str]]:
    """The command, quoted for a shell, and what to know of it."""
    model, note = _model(made)
    words, notes = command(made, model)
    return shlex.join(words), notes + ([note] if note else [])


def _model(made: Made) -> tuple[str | None, str | None]:
    """(what to give to -m, what to know of it): the model of that name on this machine, if there is one."""
    if made.model is None:
        return None, None if made.tool == "diffgen" else "the file does not say which model it was: say it with -m"
    if made.tool == "diffgen" and made.model in bundled_names():
        return (None if made.model == DEFAULT else made.model), None
    stem = re.sub(r"\.(safetensors|ckpt|gguf|sft|pt)$", "", made.model)
    for name in dict.fromkeys((made.model, f"{stem}.safetensors", stem)):
        if made.tool != "diffgen" and name in bundled_names():
            continue
        try:
            find(name)
        except InputError:
            continue
        return name, None
    given = made.model if made.tool in ("diffgen", "mflux") or " " in stem else f"{stem}.safetensors"
    return given, f"there is no model {made.model!r} here: put its path after -m"


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"tool       {TOOLS[result['tool']]}"]
    for key in ("prompt", "negative", "model", "scheduler", "grid", "steps", "guidance", "seed"):
        value = result[key]
        if value is None or value == "":
            continue
        shown = f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\n           ")
        lines.append(f"{key:<10} {shown}")
    if result["width"] and result["height"]:
        lines.append(f"size       {result['width']}x{result['height']}")
    return [*lines, "", result["command"]]
