"""Signals: Ctrl-C, SIGTERM and the end of the terminal stop a command, at once or where it is safe."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from diffgen.errors import DiffgenError


class Stopped(BaseException):
    """Raised when one of STOPPING arrives."""


STOPPING = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOPPING.append(signal.SIGHUP)


_received: list[int] = []  # numbers of the signals, oldest first
_deferred = False  # inside `uninterrupted`
_polled = False  # inside `interruptible`


def install() -> None:
    """Handle the signals of STOPPING: they raise Stopped in the main thread. What `nohup` ignores stays ignored."""
    for number in STOPPING:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def ignore() -> None:
    """Ignore further signals, so that a second Ctrl-C cannot cut the last message off."""
    for number in STOPPING:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)


def first_signal() -> int | None:
    """The number of the first signal that arrived; None if none did."""
    return _received[0] if _received else None


def forget_signals() -> None:
    """Clear the signals once the work that they stop has stopped, so that other work can follow."""
    _received.clear()


def raise_if_stopped() -> None:
    """Raise Stopped if a signal arrived: code in between may have swallowed the exception."""
    if _received:
        raise Stopped


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer signals to the end of the block, so that a file that was written is also reported."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    raise_if_stopped()


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let the block poll for the first signal through the callable it gets; a second signal stops at once.

    An error inside the block, such as a full disk, is reported instead of the signal.
    """
    global _polled
    _polled = True
    try:
        yield lambda: bool(_received)
    except DiffgenError:
        _received.clear()
        raise
    finally:
        _polled = False


def _stop(number: int, frame: Any) -> None:
    _received.append(number)
    if not _deferred and not (_polled and len(_received) == 1):
        raise Stopped
