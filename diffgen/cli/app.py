"""The parser of `diffgen` itself: its help, its version, its commands."""

from __future__ import annotations

import difflib
import re
import shlex
from typing import Annotated, Any

import typer

from diffgen.errors import UsageError
from diffgen.version import __version__

from .commands import COMMANDS, SETTINGS, Group, parser


class Root(Group):
    """All commands; a word that is no command is taken for a prompt, and the error shows how to write it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not difflib.get_close_matches(name, self.commands):
            first_option = next((i for i, word in enumerate(args) if word.startswith("-")), len(args))
            prompt = " ".join(args[:first_option])
            quoted = shlex.quote(prompt) if re.search(r'["$`\\!]', prompt) else f'"{prompt}"'
            hint = f"to make a picture of it: diffgen generate {quoted}; see: diffgen --help"
            raise UsageError(f"there is no command {name!r}", hint)
        return super().resolve_command(ctx, args)


def _version(value: bool) -> None:
    if value:
        print(f"diffgen {__version__}")
        raise typer.Exit


def _build() -> Root:
    app = typer.Typer(
        cls=Root,
        help="Pictures from prompts, on this machine, offline.",
        epilog='Try: diffgen generate "a red apple"',
        **SETTINGS | {"add_completion": True},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        pass

    group = typer.main.get_command(app)
    assert isinstance(group, Root)
    for name, command in COMMANDS.items():
        group.add_command(parser(name, command))
    return group


app = _build()
