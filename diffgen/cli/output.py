"""The output of every command: results on stdout, the rest on stderr, one line per error, one document with --json."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

from diffgen.environment import outdated
from diffgen.errors import DiffgenError, UsageError, shortened

SCHEMA = "diffgen.result/1"
MAX_LINE = 1950  # characters of an error or a note on stderr

# The options that every command has.
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, even on errors.", rich_help_panel="Output")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors on stderr.", rich_help_panel="Output")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]


class UnfinishedError(Exception):
    """The error of a command that did a part of its work, with the result so far."""

    def __init__(self, error: BaseException, result: dict[str, Any]) -> None:
        super().__init__(str(error))
        self.error, self.result = error, result


class Output:
    """The output of one command."""

    def __init__(self, command: str, as_json: bool = False, quiet: bool = False) -> None:
        self.command, self.as_json, self.quiet = command, as_json, quiet
        self._warned: set[str] = set()

    def line(self, text: str) -> None:
        """Print a line of the result, unescaped. With --json, print nothing: `result` has it."""
        if not self.as_json:
            print(text, flush=True)

    def result(self, result: dict[str, Any], lines: Iterable[str] = ()) -> None:
        """Print the result, once: as JSON, or as its lines."""
        if self.as_json:
            document(self.command, ok=True, result=result)
        else:
            for line in lines:
                self.line(printable(line))

    def note(self, text: str) -> None:
        if not self.quiet:
            print(shortened(printable(text), MAX_LINE), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning, once."""
        if text not in self._warned:
            self._warned.add(text)
            self.note(f"warning: {text}")

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a spinner with the text on a terminal, until the block ends."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(printable(text))):
            yield

    @contextlib.contextmanager
    def progress(self, what: str, above: Any = None) -> Iterator[Callable[..., None] | None]:
        """Show a progress bar with the remaining time on a terminal, and before it what is outdated.

        Yields `on_step(done, total, text)`, which moves the bar; None without a terminal. `above` is an `observe.View`
        that is drawn above the bar.
        """
        for warning in outdated():
            self.warn(warning)
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console, Group
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        kind: type[Progress] = Progress
        if above is not None:
            above.console = console = Console(stderr=True, color_system=above.color_system)

            class Viewed(Progress):
                def get_renderable(self) -> Any:
                    return Group(above, super().get_renderable())

            kind = Viewed
        # Two threads that print, rich's own and this one, can lose lines. With pictures, only this one draws.
        settings: dict[str, Any] = {"transient": True, "redirect_stdout": sys.stdout.isatty()}
        with kind(*columns, console=console, auto_refresh=above is None, **settings) as bar:
            task = bar.add_task(what, total=None)

            def step(done: int, total: int, text: str = what) -> None:
                redraw = above is not None and above.changed()
                bar.update(task, completed=done, total=total, description=text, refresh=redraw)

            yield step


def document(command: str, **content: Any) -> None:
    """Print the JSON document, in ASCII, so that no locale can break it."""
    print(json.dumps({"schema": SCHEMA, "ok": content.pop("ok"), "command": command, **content}), flush=True)


def fail(command: str, as_json: bool, error: DiffgenError, code: int, result: dict[str, Any] | None = None) -> None:
    """Print the error in one line on stderr. With --json, print the document too, with the result so far."""
    text = f"{error.message.rstrip('.')}; {error.hint}" if error.hint else error.message
    with contextlib.suppress(OSError):  # the output is closed; the exit code still reports the error
        print("error: " + shortened(printable(" ".join(text.split())), MAX_LINE), file=sys.stderr, flush=True)
    if as_json:
        details = {"code": int(code), "message": error.message, "hint": error.hint}
        with contextlib.suppress(OSError):
            document(command, ok=False, error=details, **({} if result is None else {"result": result}))


def refuse_empty(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise UsageError for an empty argument: as a path it would mean the current folder.

    `values` maps parameters to their values; `names` maps a parameter to its option, if the names differ.
    """
    for name, value in values.items():
        if "" in (value if isinstance(value, list) else [value]):
            option = names.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"{option} is empty", "give it a value, or leave it out")


def printable(text: str) -> str:
    """The text with control characters escaped: a prompt or a file name must not control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" or "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in text)


def time_text(seconds: float) -> str:
    """A duration as text: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(rows: list[list[str]]) -> Iterator[str]:
    """The rows as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
