"""The one function that puts a file in place: under its final name a file is complete, or does not exist."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffgen.errors import CannotWrite

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
HAS_LOCKS = fcntl is not None

# What os.link answers where a file system has no hard links (exFAT, some network and FUSE mounts).
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the limit",
    errno.ENOENT: "there is no such folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EEXIST: "it exists",
}


TEMPORARY = ".diffgen-"  # how names of unfinished files and folders begin
YOUNG = 2.0  # seconds: something so new may not be locked by its process yet
LOCK = ".lock"  # the file in a folder that is locked
_swept: set[str] = set()  # folders that were searched for what killed processes left


def temporary_in(folder: Path) -> Path:
    """A new name in a folder for something unfinished."""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}"


class Exists(CannotWrite):
    """The name is taken: a file, a folder or a symbolic link, dangling ones included."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"cannot write {path}: it exists", "choose another -o, or add --overwrite")


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The system's refusal in plain words."""
    reason = REASONS.get(error.errno or 0) or error.strerror or str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "make room, or choose another -o" if full else "choose another -o"
    return CannotWrite(f"cannot write {path}: {reason}", hint)


def check_writable(path: Path) -> None:
    """Raise CannotWrite if no file can be written beside `path`: before the work whose result it shall hold."""
    temporary = temporary_in(path.parent)
    try:
        with _written(temporary, b"?"):
            temporary.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


def publish(path: Path, data: bytes, overwrite: bool = False) -> None:
    """Write `data` under a temporary name (`.diffgen-…`) in the same folder, then give it its own name in one step.

    A name that is taken is refused (`Exists`), or replaced if `overwrite`; a symbolic link is never followed. The
    mode is 0666 less the umask. Whatever happens, no temporary file stays behind, except after a kill -9: then the next
    process that writes into the folder removes it. Raises CannotWrite, with the reason in words.
    """
    if str(path.parent) not in _swept:
        _swept.add(str(path.parent))
        sweep(path.parent)
    temporary = temporary_in(path.parent)
    try:
        try:
            with _written(temporary, data):
                if overwrite:
                    os.replace(temporary, path)
                else:
                    _link(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except FileExistsError as error:
        raise Exists(path) from error
    except OSError as error:
        raise cannot_write(path, error) from error
    sync_folder(path.parent)


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[None]:
    """Write the temporary file, and hold its lock, by which `sweep` sees that its process lives."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with open(descriptor, "wb") as file:
        try_lock(descriptor)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
        if not HAS_LOCKS:  # Windows renames no open file
            file.close()
        yield


def sweep(folder: Path) -> None:
    """Remove the unfinished files and folders that killed processes left in a folder, where the system has locks."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(TEMPORARY):
                _remove_if_left(folder / name)


def _remove_if_left(path: Path) -> None:
    """Remove something unfinished if its lock is free: that of the file, or of the file LOCK in the folder."""
    with contextlib.suppress(OSError):
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
        descriptor = os.open(path / LOCK if is_folder else path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > YOUNG and try_lock(descriptor):
                shutil.rmtree(path) if is_folder else path.unlink()
        finally:
            os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock a file; False if another process holds its lock, or there are no locks."""
    if not HAS_LOCKS:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _link(temporary: Path, path: Path) -> None:
    """Give the temporary file a second name; the system refuses a name that exists, also in a race."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # Without hard links the name is first taken with an empty file, which the picture replaces at once.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # the file is in place: a system that cannot sync a folder is no failure
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
