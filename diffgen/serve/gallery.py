"""The pictures in the output folder: an index of what is there, and the only way to a file is through it."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffgen.errors import CannotWrite, DiffgenError
from diffgen.generation.record import read_picture_info, read_record
from diffgen.images.naming import Outputs
from diffgen.images.read import MAX_PIXELS, read_image

KEPT = 200  # pictures of a gallery that is not kept
THUMBNAIL = 256  # pixels a side
THUMBNAILS = 500  # in memory
SUMMARY = ("prompt", "seed", "width", "height", "steps", "scheduler", "model", "pixels_sha256")


@dataclass(frozen=True)
class Entry:
    """A picture of the index. Its id is the file's name without .png."""

    id: str
    path: Path
    created: float  # seconds since 1970: the file's time
    about: Mapping[str, Any]  # the keys of SUMMARY; None where the file does not say it

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "created": round(self.created, 3), **self.about}


class Gallery:
    """The PNG files directly in a folder. Its methods may wait for the disk: call them in a thread.

    `folder` None: a temporary one, removed by `close`, which keeps the newest `KEPT` pictures.
    """

    def __init__(self, folder: str | None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="diffgen-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else str(folder))
        self._outputs = Outputs(str(self.folder).rstrip("/\\") + os.sep, 1)
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._scanned: tuple[int, int] | None = None  # the folder's (time, number of entries) at the last scan
        self._thumbnails: OrderedDict[tuple[str, float], bytes] = OrderedDict()

    @property
    def kept(self) -> bool:
        """Whether the pictures outlive the server."""
        return self._temporary is None

    def close(self) -> None:
        """Remove the folder if it is temporary."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def add(self, png: bytes, record: Mapping[str, Any]) -> Entry:
        """Write a picture under the next name and return its entry. Raises CannotWrite."""
        with self._lock:
            path = self._outputs.write(
                png,
                seed=record["seed"],
                prompt=record["prompt"],
                model=record["model"],
                scheduler=record["scheduler"],
                steps=record["steps"],
            )
            entry = Entry(path.stem, path, path.stat().st_mtime, {key: record.get(key) for key in SUMMARY})
            self._entries[entry.id] = entry
            if not self.kept and len(self._entries) > KEPT:
                self._remove(next(iter(self._entries)))
            return entry

    def get(self, id: str) -> Entry | None:
        """The entry with an id; None if there is none. An id is looked up, never part of a path."""
        with self._lock:
            if id not in self._entries:
                self._scan()
            return self._entries.get(id)

    def listed(self, query: str = "", after: str | None = None, limit: int = 60) -> tuple[list[Entry], int]:
        """(the newest entries that have all words of the query in their prompt or name, how many there are in all).

        With `after`, the list begins behind that entry.
        """
        with self._lock:
            self._scan()
            entries = sorted(self._entries.values(), key=lambda entry: (entry.created, entry.id), reverse=True)
        words = query.lower().split()
        entries = [entry for entry in entries if all(word in _searched(entry) for word in words)]
        total = len(entries)
        if after is not None:
            place = next((i for i, entry in enumerate(entries) if entry.id == after), -1)
            entries = entries[place + 1 :]
        return entries[:limit], total

    def read(self, entry: Entry) -> bytes:
        """The bytes of the file. Raises FileNotFoundError if somebody deleted it."""
        return entry.path.read_bytes()

    def record(self, entry: Entry) -> dict[str, Any]:
        """How the picture was made: our own record, else another tool's metadata. Raises InputError."""
        try:
            return read_record(entry.path)
        except DiffgenError:
            info = read_picture_info(entry.path)
            return {key: value for key, value in vars(info).items() if not key.startswith("_")}

    def thumbnail(self, entry: Entry) -> bytes:
        """A WebP of at most THUMBNAIL pixels a side; small pictures keep their size. Raises InputError."""
        key = entry.id, entry.created
        with self._lock:
            if key in self._thumbnails:
                self._thumbnails.move_to_end(key)
                return self._thumbnails[key]
        image = read_image(entry.path, max_pixels=MAX_PIXELS)
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "WEBP", quality=90, method=2, lossless=max(image.size) <= 128)
        with self._lock:
            self._thumbnails[key] = file.getvalue()
            while len(self._thumbnails) > THUMBNAILS:
                self._thumbnails.popitem(last=False)
        return file.getvalue()

    def delete(self, entry: Entry) -> None:
        """Delete the file of an entry. Raises CannotWrite."""
        with self._lock:
            self._remove(entry.id)

    def _remove(self, id: str) -> None:
        entry = self._entries.pop(id, None)
        if entry is not None:
            try:
                entry.path.unlink(missing_ok=True)
            except OSError as error:
                raise CannotWrite(f"cannot delete {entry.path.name}: {error.strerror}") from error

    def _scan(self) -> None:
        """Bring the index up to date with the folder, if that has changed."""
        try:
            state = self.folder.stat().st_mtime_ns, len(self._entries)
        except OSError:
            self._entries.clear()
            return
        if state == self._scanned:
            return
        files: dict[str, os.DirEntry[str]] = {}
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for file in entries:
                if file.name.endswith(".png") and not file.name.startswith(".") and file.is_file(follow_symlinks=False):
                    files[file.name[: -len(".png")]] = file
        for id in [id for id in self._entries if id not in files]:
            del self._entries[id]
        for id, file in files.items():
            with contextlib.suppress(OSError):
                created = file.stat(follow_symlinks=False).st_mtime
                known = self._entries.get(id)
                if known is None or known.created != created:
                    self._entries[id] = Entry(id, Path(file.path), created, _about(Path(file.path)))
        self._scanned = self.folder.stat().st_mtime_ns, len(self._entries)


def _about(path: Path) -> dict[str, Any]:
    try:
        record: Mapping[str, Any] = read_record(path)
    except DiffgenError:
        try:
            record = vars(read_picture_info(path))
        except DiffgenError:
            record = {}
    return {key: record.get(key) for key in SUMMARY}


def _searched(entry: Entry) -> str:
    return f"{entry.about.get('prompt') or ''} {entry.id}".lower()
