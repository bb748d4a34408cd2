"""Keep other processes from writing a result into the same folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from diffgen.errors import CannotWrite

from .publish import HAS_LOCKS, LOCK, cannot_write, try_lock

MAX_HOLDER = 1000  # bytes
POLL = 0.2  # seconds between two tries for a lock


@contextlib.contextmanager
def locked(folder: Path, work: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Create the folder, and hold its lock. The system releases it when the process ends, after a kill -9 too.

    `work` says what it does there, such as "training". Raises CannotWrite if another process holds the lock; the
    message says which one, on which machine, and since when. With `waiting`, waits for it instead, and calls
    `waiting(message)` before each try; an exception there ends the wait.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        while HAS_LOCKS and not try_lock(descriptor):
            message = f"another process is {work} in {folder}{_holder(descriptor)}"
            if waiting is None:
                raise CannotWrite(message, "wait for it with --wait, or choose another -o")
            waiting(message)
            time.sleep(POLL)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        _write(descriptor, {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")})
        yield
    finally:
        _write(descriptor, None)  # names of machines stay in no folder that may be passed on
        os.close(descriptor)


def _write(descriptor: int, holder: dict[str, object] | None) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        if holder is not None:
            os.write(descriptor, json.dumps(holder).encode())


def _holder(descriptor: int) -> str:
    """The process that holds the lock, in words; empty if its file does not say."""
    try:
        holder = json.loads(os.pread(descriptor, MAX_HOLDER, 0))
        process, host, since = (str(holder[key])[:100] for key in ("process", "host", "since"))
    except (ValueError, KeyError, TypeError, OSError):
        return ""
    return f": process {process} on {host}, since {since}"
