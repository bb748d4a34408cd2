"""Keep other processes from writing a result into the same folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from diffgen.errors import CannotWrite

from .publish import HAS_LOCKS, cannot_write, try_lock

NAME = ".lock"
MAX_HOLDER = 1000  # bytes


@contextlib.contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Create the folder, and hold its lock. The system releases it when the process ends, after a kill -9 too.

    `work` says what it does there, such as "training". Raises CannotWrite if another process holds the lock; the
    message says which one, on which machine, and since when.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if HAS_LOCKS and not try_lock(descriptor):
        holder = _holder(descriptor)
        os.close(descriptor)
        raise CannotWrite(f"another process is {work} in {folder}{holder}", "wait for it, or choose another -o")
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
        holder = json.loads(os.read(descriptor, MAX_HOLDER))
        process, host, since = (str(holder[key])[:100] for key in ("process", "host", "since"))
    except (ValueError, KeyError, TypeError, OSError):
        return ""
    return f": process {process} on {host}, since {since}"
