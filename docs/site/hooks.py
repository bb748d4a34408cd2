"""What the site adds to the pages of the guide: the reference of the commands, and links to files of the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from diffgen.cli.app import app

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./(?:samples|diffgen)[^)]*\)")  # a link to a file that is not in the site
SHEET = Path(__file__).parents[2] / "samples" / "gallery" / "sheet.png"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "reference/cli.md", content="\n".join(reference())))
    files.append(File.generated(config, "sheet.png", content=SHEET.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the repository become their text: the site does not have them."""
    return OUTSIDE.sub(r"\1", markdown)


def reference() -> Iterator[str]:
    """The page of all commands with their options, from the parser itself."""
    yield "# Commands\n"
    yield "Every command has `--help`. Exit codes: see [errors](python.md#errors).\n"
    yield from described(app, "diffgen")


def described(command: Any, name: str) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    command = context.command
    if subcommands := getattr(command, "commands", None):
        if name != "diffgen":
            yield f"## {name}\n"
            yield f"{command.help}\n"
        for word, subcommand in subcommands.items():
            yield from described(subcommand, f"{name} {word}")
        return
    yield f"## {name}\n"
    yield f"{command.help}\n"
    yield f"```text\n{name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if getattr(parameter, "help", None) and not getattr(parameter, "hidden", False):
            other = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or other, []).append(parameter)
    for panel, parameters in panels.items():
        yield f"| {panel} | |\n|---|---|"
        for parameter in parameters:
            flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
            yield f"| {flags} | {escaped(parameter.help)} |"
        yield ""


def escaped(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")
