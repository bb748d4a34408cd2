"""What a command prints when it fails, and its exit code."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator, Sequence

import typer

from diffgen.errors import CannotWrite, DiffgenError, ExitCode, OutOfMemory, UsageError, shortened

from .commands import COMMANDS
from .output import UnfinishedError, fail
from .signals import first_signal

# Typer has its own copy of click since 0.2x; the base of its errors is only reachable through a subclass.
ParserError: type[Exception] = typer.BadParameter.__mro__[2]


NO_MEMORY = ("Cannot allocate memory", "failed to map segment", "can't allocate memory")  # said by the system and torch

INTERRUPTIONS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

GROUPS = {name for name, command in COMMANDS.items() if command.commands}


def report(error: BaseException, options: Sequence[str]) -> int:
    """Print the error of a command line and return its exit code. Print nothing if the output is closed."""
    words = [word for word in options if not word.startswith("-")]
    command = " ".join(words[: 2 if words and words[0] in GROUPS else 1])
    result = error.result if isinstance(error, UnfinishedError) else None
    error = error.error if isinstance(error, UnfinishedError) else error
    if "--debug" in options:
        import traceback

        traceback.print_exception(error)
    # Typer raises SystemExit when its output is closed. Like other programs, say nothing, as in `diffgen … | head`.
    if isinstance(error, BrokenPipeError | SystemExit) and first_signal() is None:
        return ExitCode.FAILED
    shown, code = error_and_code(error, command)
    first_process = command != "train" or os.environ.get("RANK", "0") == "0"  # torchrun's processes share one stdout
    fail(command, first_process and "--json" in options, shown, code, result)
    return code


def error_and_code(error: BaseException, command: str) -> tuple[DiffgenError, int]:
    """The error to print for an exception that ended a command, and the exit code."""
    number = first_signal()
    if number is not None:  # whichever exception: imports and C code turn Stopped into other errors
        return DiffgenError(INTERRUPTIONS.get(number, "the terminal was closed")), 128 + number
    if isinstance(error, DiffgenError):
        return error, error.code
    if isinstance(error, ParserError):
        context = getattr(error, "ctx", None)  # the innermost command that exists; None if a value is missing
        hint = f"see: {context.command_path if context else f'diffgen {command}'} --help"
        return UsageError(error.format_message(), hint), ExitCode.USAGE  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # on stdout
        return CannotWrite(f"cannot write: {error.strerror}", "make room"), ExitCode.WRITE
    if any(_lacks_memory(cause) for cause in _chain(error)):
        hint = "make something smaller, raise the limit (ulimit -v), or close other programs"
        return OutOfMemory("out of memory", hint), ExitCode.MEMORY
    message = f"{type(error).__name__}: {shortened(str(error))}"
    return DiffgenError(message, "add --debug for the traceback"), ExitCode.FAILED


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
