"""A folder of files on this machine, or on a store that fsspec knows (s3://, gs://, memory://): whole files by name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from .errors import CannotWrite, DiffgenError, InputError, UsageError
from .images.lock import locked
from .images.publish import cannot_write, publish, sync_folder, temporary_in
from .models.gate import open_file

T = TypeVar("T")
FOLDER = -1  # the size of an entry that is a folder
AT_ONCE = 64  # requests to a remote store


class Storage:
    """Files by their names below one folder, with / between the parts. A file appears under its name complete."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        """Raises UsageError for a kind of store whose package is not installed."""
        text = os.fspath(place)
        self.is_remote = bool(re.match(r"[a-z0-9+]+://", text))
        self.place = without_credentials(text)
        self.fs: Any = None
        self.root = text
        if self.is_remote:
            import fsspec

            try:
                self.fs, self.root = fsspec.core.url_to_fs(text)
            except (ImportError, ValueError) as error:
                raise UsageError(f"cannot use {self.place}: {error}", "install the package that it names") from error
            self.root = self.root.rstrip("/")

    def path(self, name: str) -> Path:
        """The path of a local file."""
        return Path(self.root, name)

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; it can seek. Raises InputError."""
        if not self.is_remote:
            return self._reading(name, lambda: open_file(self.path(name)))
        # Python's reader around it: readline of fsspec's own files takes no limit
        return self._reading(name, lambda: io.BufferedReader(self.fs.open(f"{self.root}/{name}", "rb")))

    def read(self, name: str) -> bytes:
        """The content of a file. Raises InputError."""
        if not self.is_remote:
            return self._reading(name, lambda: _content(self.path(name)))
        return self._reading(name, lambda: self.fs.cat_file(f"{self.root}/{name}"))

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of many files; a remote store answers several requests at once. Raises InputError."""
        if not self.is_remote:
            yield from ((name, self.read(name)) for name in names)
            return
        for first in range(0, len(names), AT_ONCE):
            part = names[first : first + AT_ONCE]
            if len(part) == 1:
                yield part[0], self.read(part[0])
                continue
            paths = {f"{self.root}/{name}": name for name in part}
            contents = self._reading(part[0], lambda paths=paths: self.fs.cat(list(paths)))  # type: ignore[misc]
            yield from ((name, contents[path]) for path, name in paths.items())

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The entries of a folder with their sizes in bytes; FOLDER for a folder. Empty if it does not exist.

        Names that begin with a dot are left out. Raises InputError.
        """

        def local() -> dict[str, int]:
            with os.scandir(self.path(folder)) as entries:
                return {e.name: FOLDER if e.is_dir() else e.stat().st_size for e in entries if e.name[0] != "."}

        def remote() -> dict[str, int]:
            path = f"{self.root}/{folder}".rstrip("/")
            self.fs.invalidate_cache()
            sizes = {}
            for entry in self.fs.ls(path, detail=True):
                name = entry["name"].rstrip("/").rpartition("/")[2]
                if name and name[0] != "." and entry["name"].rstrip("/") != path:
                    sizes[name] = FOLDER if entry["type"] == "directory" else int(entry["size"])
            return sizes

        return self._reading(folder, remote if self.is_remote else local, missing=dict)

    def exists(self, name: str) -> bool:
        if not self.is_remote:
            return self.path(name).exists()
        self.fs.invalidate_cache()
        return self._reading(name, lambda: bool(self.fs.exists(f"{self.root}/{name}")))

    def put(self, name: str, data: bytes) -> None:
        """Write a file, in place of the one that has its name. Raises CannotWrite."""
        if self.is_remote:
            self._writing(name, lambda: self.fs.pipe_file(f"{self.root}/{name}", data))
            return
        path = self.path(name)
        with _refused(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, data, overwrite=True)

    def put_path(self, name: str, source: Path) -> None:
        """Give a file or a folder of `scratch` its name, in place of what has it. Raises CannotWrite.

        On this machine that is one step, also for a folder. On a remote store the files of a folder appear one by one.
        """
        if self.is_remote:
            for path in sorted(source.iterdir()) if source.is_dir() else [source]:
                own = f"{name}/{path.name}" if source.is_dir() else name
                self._writing(own, lambda path=path, own=own: self.fs.put_file(str(path), f"{self.root}/{own}"))  # type: ignore[misc]
            return
        path = self.path(name)
        with _refused(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                self.remove(name)
            os.replace(source, path)
        sync_folder(path.parent)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything in it, if it exists. Raises CannotWrite."""
        if self.is_remote:
            if self.exists(name):
                self._writing(name, lambda: self.fs.rm(f"{self.root}/{name}", recursive=True))
            return
        path = self.path(name)
        with _refused(path):
            if path.is_dir() and not path.is_symlink():
                with self.scratch() as aside, contextlib.suppress(FileNotFoundError):
                    os.replace(path, aside / path.name)  # it disappears in one step
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A locked folder on this machine for files that `put_path` publishes. Raises CannotWrite."""
        folder = temporary_in(Path(tempfile.gettempdir() if self.is_remote else self.root))
        try:
            with locked(folder, "writing"), _refused(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _reading(self, name: str, action: Callable[[], T], missing: Callable[[], T] | None = None) -> T:
        try:
            return action()
        except FileNotFoundError as error:
            if missing is not None:
                return missing()
            raise InputError(f"there is no {self.place.rstrip('/')}/{name}".rstrip("/")) from error
        except DiffgenError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            if missing is not None and isinstance(error, NotADirectoryError):
                return missing()
            raise InputError(f"cannot read {self.place.rstrip('/')}/{name}: {_reason(error)}") from error

    def _writing(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            message = f"cannot write {self.place}/{name}: {_reason(error)}"
            raise CannotWrite(message, "check the address, the permissions and the network") from error


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def without_credentials(place: str) -> str:
    """The address without a user name and a password."""
    return re.sub(r"://[^/@]*@", "://", place)


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Raise CannotWrite for the system's refusals in the block."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def _reason(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return without_credentials(text)
