"""diffgen models: what is on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from diffgen.models.find import bundled_models, find
from diffgen.models.info import info as about

from .output import Debug, Json, Output, Quiet, table


def list_models(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """The models that come with diffgen."""
    columns = ("name", "family", "source", "bytes", "licence", "resolution", "folder")
    found = [{key: said[key] for key in columns} for said in map(about, bundled_models())]
    rows = [[str(entry[key] if entry[key] is not None else "-") for key in columns] for entry in found]
    Output("models list", json, quiet).result({"models": found}, table([list(columns), *rows]))


def info(
    name: Annotated[str | None, typer.Argument(help="A bundled model or a diffusers folder. \\[emoji]")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What a model is: its size, its licence, what it knows."""
    said = about(find(name))
    rows = [[key, _brief(value)] for key, value in said.items() if value not in (None, [], {})]
    Output("models info", json, quiet).result(said, table(rows))


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)}: {_brief(value[:12])}, … (all of them: --json)"
    if isinstance(value, list):
        return ", ".join(" ".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
