"""The command `diffgen`. Parses, calls one function, prints. No torch at import."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from typing import Any, NoReturn

from diffgen.errors import CannotWrite, DiffgenError, ExitCode, OutOfMemory, UsageError


class Stopped(BaseException):
    """A signal came: SIGINT or SIGTERM."""


_signals: list[int] = []  # those that came
_held = False  # inside `whole`
_patient = False  # inside `patient`


def main() -> NoReturn:
    """The console script. Leaves without tearing torch down, which would take up to a second."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding == "utf-8" else "backslashreplace")
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads any more
            code = code or ExitCode.FAILED
    os._exit(code)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; what goes wrong is said in one line, or in one document."""
    options = list(args[: args.index("--")]) if "--" in args else list(args)
    if not sys.stdout.isatty():
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # no colour in a file, whatever CI systems set
    try:
        from .app import app

        code = app(list(args) or ["--help"], prog_name="diffgen", standalone_mode=False)
        if _signals:  # somebody's `except` swallowed it
            raise Stopped
        return code or ExitCode.DONE
    except BaseException as caught:
        return _fail(caught, options)


def _fail(caught: BaseException, options: Sequence[str]) -> int:
    """Say what went wrong; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _stop:  # it is leaving already: a second Ctrl-C must not cut the message off
            signal.signal(number, signal.SIG_IGN)
    return tell(caught, options)


def tell(caught: BaseException, options: Sequence[str]) -> int:
    """Say what went wrong with a command line; its exit code."""
    from .app import GROUPS
    from .output import UnfinishedError, fail

    words = [word for word in options if not word.startswith("-")]
    command = " ".join(words[: 2 if words and words[0] in GROUPS else 1])
    result = caught.result if isinstance(caught, UnfinishedError) else None
    caught = caught.error if isinstance(caught, UnfinishedError) else caught
    if "--debug" in options:
        import traceback

        traceback.print_exception(caught)
    error, code = _explain(caught, command)
    alone = command != "train" or os.environ.get("RANK", "0") == "0"  # torchrun's processes share one stdout
    fail(command, alone and "--json" in options, error, code, result)
    return code


def arrived() -> int | None:
    """The first signal that came, if one did."""
    return _signals[0] if _signals else None


def forget_signals() -> None:
    """They have been obeyed: the work that they were to stop is stopped, and other work may follow."""
    _signals.clear()


def _explain(caught: BaseException, command: str) -> tuple[DiffgenError, int]:
    """What to tell of an exception that ended a command, and the exit code."""
    from .app import ParserError

    if _signals:  # whatever was caught: imports and C code turn what a signal raises into other errors
        stopped = _signals[0] == signal.SIGINT
        return DiffgenError("interrupted" if stopped else "terminated"), 128 + _signals[0]
    if isinstance(caught, DiffgenError):
        return caught, caught.code
    if isinstance(caught, ParserError):
        context = getattr(caught, "ctx", None)  # of the innermost command that exists; None for a value that is missing
        hint = f"see: {context.command_path if context else f'diffgen {command}'} --help"
        return UsageError(caught.format_message(), hint), ExitCode.USAGE  # type: ignore[attr-defined]
    if isinstance(caught, BrokenPipeError | SystemExit):  # typer leaves so where nobody reads its output
        return DiffgenError("nobody reads the output any more"), ExitCode.FAILED
    if isinstance(caught, MemoryError):
        return OutOfMemory("out of memory", "make something smaller, or close other programs"), ExitCode.MEMORY
    if isinstance(caught, OSError) and caught.errno in (errno.ENOSPC, errno.EDQUOT):  # of stdout
        return CannotWrite(f"cannot write: {caught.strerror}", "make room"), ExitCode.WRITE
    return DiffgenError(f"{type(caught).__name__}: {caught}", "add --debug for the traceback"), ExitCode.FAILED


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """A signal that comes inside is obeyed at the end, so that what has been written is also told of."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
    if _signals:
        raise Stopped


@contextlib.contextmanager
def patient() -> Iterator[Callable[[], bool]]:
    """The first signal that comes inside is for the caller to obey, who asks the callable at times; a second is obeyed
    at once. An error that is met on the way out (a full disk) is told of instead.
    """
    global _patient
    _patient = True
    try:
        yield lambda: bool(_signals)
    except DiffgenError:
        _signals.clear()
        raise
    finally:
        _patient = False


def _stop(number: int, frame: Any) -> None:
    _signals.append(number)
    if not _held and not (_patient and len(_signals) == 1):
        raise Stopped
