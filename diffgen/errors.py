"""All errors: the exit codes, and the exceptions that carry them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1  # while running
    USAGE = 2  # wrong on the command line
    INPUT = 3  # an input is missing, refused, invalid, or does not fit
    MEMORY = 4  # out of memory
    OUTPUT = 5  # the output is invalid: not finite, reproduction differs, training diverged
    WRITE = 6  # cannot write: exists, in use, disk full, permission
    INTERRUPTED = 130
    TERMINATED = 143


class DiffgenError(Exception):
    """An error for the user: what happened and what was seen (`message`), what to do (`hint`)."""

    code = ExitCode.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


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
