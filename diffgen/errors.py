"""All errors: the exit codes, and the exceptions that carry them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1  # while running
    USAGE = 2  # wrong on the command line
    INPUT = 3  # an input is missing, refused, invalid, or does not fit
    MEMORY = 4  # out of memory
    OUTPUT = 5  # the output is invalid: not finite, reproduction differs, training diverged
    WRITE = 6  # cannot write: exists, in use, disk full, permission
    HUNG_UP = 129  # the terminal was closed
    INTERRUPTED = 130
    TERMINATED = 143


MAX_TEXT = 1400  # characters of a message; a hint has at most a third


def shortened(text: str, most: int = MAX_TEXT) -> str:
    """The text with its middle left out where it is too long: what a file says may have any length."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]} … {text[-most // 5 :]}"


class DiffgenError(Exception):
    """An error for the user: what happened and what was seen (`message`), what to do (`hint`)."""

    code = ExitCode.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = shortened(message), shortened(hint, MAX_TEXT // 3)
        super().__init__(self.message)


class UsageError(DiffgenError):
    code = ExitCode.USAGE


class InputError(DiffgenError):
    code = ExitCode.INPUT


class OutOfMemory(DiffgenError):  # noqa: N818
    code = ExitCode.MEMORY


class InvalidOutput(DiffgenError):  # noqa: N818
    code = ExitCode.OUTPUT


class CannotWrite(DiffgenError):  # noqa: N818
    code = ExitCode.WRITE


class FailedElsewhere(Exception):  # noqa: N818
    """Another process of the same work has failed and reports the error; its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another process failed, with exit code {code}")
        self.code = code


def check_keywords(keywords: Iterable[str], function: str, names: Iterable[str]) -> None:
    """Raise UsageError for a keyword argument that a function does not take, with the nearest of its `names`."""
    names = list(names)
    for name in keywords:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
            raise UsageError(f"{function} takes no keyword {name!r}", hint)


def checked_arguments(*more: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function of the Python API raise UsageError for a keyword that it does not take or an argument it lacks.

    `more` are the names that it takes as `**options`.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        import inspect  # not needed by the commands that must start fast

        signature = inspect.signature(function)
        names = [name for name, one in signature.parameters.items() if one.kind != one.VAR_KEYWORD] + list(more)

        @functools.wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> T:
            check_keywords(keywords, function.__name__, names)
            try:
                signature.bind(*args, **keywords)
            except TypeError as error:
                raise UsageError(f"{function.__name__}: {error}") from None
            return function(*args, **keywords)

        return call

    return decorate
