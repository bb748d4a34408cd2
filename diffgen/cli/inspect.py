"""diffgen inspect: how a picture was made, by what its file says, and the command that does the same here."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any

import typer

from diffgen.errors import InputError
from diffgen.generation.record import read_picture_info
from diffgen.images.readers import READERS
from diffgen.images.readers.command import command
from diffgen.images.readers.picture_info import PictureInfo
from diffgen.models.find import DEFAULT, bundled_names, find

from .output import Debug, Json, Output, Quiet, refuse_empty

EXAMPLES = """
Examples:

  diffgen inspect apple.png

  diffgen inspect from-comfyui.png --json
"""

TOOLS = {"diffgen": "diffgen"} | {tool: title for tool, (title, _) in READERS.items()}
KEYS = ("tool", "prompt", "negative", "seed", "steps", "guidance", "scheduler", "grid", "width", "height", "model")


def inspect(
    file: Annotated[str, typer.Argument(help="A PNG, JPEG or WebP picture of this or another tool.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    refuse_empty({"file": file}, {"file": "the file's name"})
    say = Output("inspect", json, quiet)
    info = read_picture_info(file)
    line, notes = command_line(info)
    for note in notes:
        say.note(f"note: {note}")
    result = {key: getattr(info, key) for key in KEYS} | {"command": line, "notes": notes}
    say.result(result, _lines(result))


def command_line(info: PictureInfo) -> tuple[str, list[str]]:
    """The command, quoted for a shell, and notes on it."""
    model, note = _model(info)
    words, notes = command(info, model)
    return shlex.join(words), notes + ([note] if note else [])


def _model(info: PictureInfo) -> tuple[str | None, str | None]:
    """(what to give to -m, notes on it): the model of that name on this machine, if there is one."""
    if info.model is None:
        return None, None if info.tool == "diffgen" else "the file does not say which model it was: say it with -m"
    if info.tool == "diffgen" and info.model in bundled_names():
        return (None if info.model == DEFAULT else info.model), None
    stem = re.sub(r"\.(safetensors|ckpt|gguf|sft|pt)$", "", info.model)
    for name in dict.fromkeys((info.model, f"{stem}.safetensors", stem)):
        if info.tool != "diffgen" and name in bundled_names():
            continue
        try:
            find(name)
        except InputError:
            continue
        return name, None
    model = info.model if info.tool in ("diffgen", "mflux") or " " in stem else f"{stem}.safetensors"
    return model, f"there is no model {info.model!r} here: put its path after -m"


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
