"""Pictures in shards, here or on a remote store: `TrainingData` of which memory holds an index and a few pictures.

Batch k of a training is a function of (seed, k), so the next ones are known: `prefetch` reads and decodes them in
threads. Remote shards are copied to a cache on this machine, whose oldest files are removed above its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from platformdirs import user_cache_path
from torch import Tensor

from diffgen.devices import out_of_memory
from diffgen.errors import InputError
from diffgen.images.pixels import MODES
from diffgen.images.publish import temporary_in
from diffgen.images.read import read_image
from diffgen.storage import Storage

from .dataset import Captions, DataSet, Progress, described, digests_of
from .decode import MAX_SIDE, WORKERS
from .index import FILE, Index, IndexCaptions, arrow, open_index, write_index

OPEN_FILES = 64
ROW_GROUPS = 32  # kept in memory; a group has at most 100 pictures in what diffgen writes


class ShardCache:
    """Copies of remote shards on this machine; a local set is used where it is. Processes share a cache."""

    def __init__(self, store: Storage, limit: float) -> None:
        """`limit` is in bytes; at least one shard is always kept."""
        self.store, self.limit = store, limit
        digest = hashlib.sha256(store.place.encode()).hexdigest()[:16]
        self.folder = user_cache_path("diffgen") / "shards" / digest

    def path(self, name: str) -> Path:
        """The path of a file of the set, copied first if it must be. Raises InputError."""
        if not self.store.is_remote:
            return self.store.path(name)
        path = self.folder / name.replace("/", "--")
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # used now
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                temporary = temporary_in(self.folder)
                with self.store.open(name) as source, temporary.open("wb") as copy:
                    while part := source.read(2**20):
                        copy.write(part)
                self._make_room(temporary.stat().st_size)
                os.replace(temporary, path)
        return path

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago."""
        files = []
        for path in self.folder.iterdir():
            if path.suffix != ".lock" and path.name[0] != "." and path.name != FILE:
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
        total = size + sum(one for _, one, _ in files)
        for _, one, path in sorted(files):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= one


class ShardedData:
    """The pictures of an indexed set: `TrainingData`."""

    classes: list[str] | None = None
    labels: Tensor | None = None
    levels = 256

    def __init__(
        self, store: Storage, index: Index, cache: ShardCache, size: tuple[int, int] | None, channels: int | None
    ) -> None:
        """`size` is (height, width). Raises InputError for pictures of several sizes if none is chosen."""
        self.store, self.index, self.cache = store, index, cache
        self.name = store.place.rstrip("/").rpartition("/")[2] or store.place
        sizes, modes = index.about["sizes"], index.about["modes"]
        if size is None:
            if len(sizes) > 1:
                raise InputError(f"the pictures in {store.place} have {len(sizes)} sizes", "choose one: data.size")
            width, height = map(int, next(iter(sizes)).split("x"))
            size = height, width
            if max(size) > MAX_SIDE:
                raise InputError(
                    f"the pictures have {width}x{height} pixels: a side is at most {MAX_SIDE}", "choose data.size"
                )
        self.size = size
        self.mode = MODES[channels] if channels else next(m for m in ("RGBA", "RGB", "L") if m in modes)
        self.channels = {mode: number for number, mode in MODES.items()}[self.mode]
        own = f"{size[1]}x{size[0]}"
        other = sum(count for name, count in sizes.items() if name != own)
        scaled = f"{other} of {len(self)} pictures scaled and cropped to {own}"
        self.notes: tuple[str, ...] = (scaled,) if other else ()
        self._pool = ThreadPoolExecutor(WORKERS)
        self._lock = threading.Lock()
        self._ahead: dict[int, Future[np.ndarray]] = {}
        self._files: OrderedDict[int, int] = OrderedDict()  # descriptors by shard
        self._group = lru_cache(maxsize=ROW_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def captions(self) -> Sequence[Captions] | None:
        return IndexCaptions(self.index) if self.index.about["captioned"] else None

    def prefetch(self, indices: Tensor) -> None:
        """Begin to read these pictures. Those that nobody asked for are forgotten."""
        wanted = indices.tolist()
        self._begin(wanted)
        for i in list(self._ahead)[: max(0, len(self._ahead) - 8 * len(wanted))]:
            self._ahead.pop(i).cancel()

    def _begin(self, wanted: list[int]) -> list[Future[np.ndarray]]:
        for i in wanted:
            if i not in self._ahead:
                self._ahead[i] = self._pool.submit(self._picture, i)
        return [self._ahead[i] for i in wanted]

    def pictures(self, indices: Tensor) -> Tensor:
        """The values of these pictures, uint8 [b, C, H, W], on the CPU. Raises InputError."""
        wanted = indices.tolist()
        futures = self._begin(wanted)
        for i in wanted:
            self._ahead.pop(i, None)  # twice in a batch where an epoch begins
        values = torch.empty(len(wanted), self.channels, *self.size, dtype=torch.uint8)
        for row, future in enumerate(futures):
            values[row] = torch.from_numpy(future.result())
        return values

    def _picture(self, i: int) -> np.ndarray:
        """uint8 [C, H, W]"""
        shard = int(self.index.shard[i])
        name = self.index.about["shards"][shard]
        try:
            image = read_image(self._bytes(i, shard, name), self.mode)
        except InputError as error:
            raise InputError(f"picture {i} of {self.name}, in {name}: {error.message}", error.hint) from error
        if image.size != self.size[::-1]:
            image = ImageOps.fit(image, self.size[::-1], Image.Resampling.LANCZOS)
        values = np.array(image)
        return np.ascontiguousarray(values[None] if self.mode == "L" else values.transpose(2, 0, 1))

    def _bytes(self, i: int, shard: int, name: str) -> bytes:
        kind, (first, second) = self.index.about["kind"], self.index.place[i].tolist()
        if kind == "files":
            return self.cache.path(f"{name}/{self.index.name(i)}").read_bytes()
        if kind == "parquet":
            with self._lock:
                return self._group(shard, first)[second]
        with self._lock:
            data = os.pread(self._descriptor(shard, name), second, first)
        if len(data) != second:
            raise InputError(f"{name} in {self.store.place} has become shorter", "index the set again")
        return data

    def _descriptor(self, shard: int, name: str) -> int:
        """The open file of a shard; a cached copy that is removed meanwhile stays readable."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):  # another process has just made room
                self._files[shard] = os.open(self.cache.path(name), os.O_RDONLY)
                break
        else:
            raise InputError(f"cannot keep {name} in the cache", "raise data.cache")
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def _read_group(self, shard: int, group: int) -> list[bytes]:
        """The files of a row group."""
        table = arrow().ParquetFile(self.cache.path(self.index.about["shards"][shard]))
        return [row["image"]["bytes"] for row in table.read_row_group(group, columns=["image"]).to_pylist()]

    def in_memory(self) -> DataSet:
        """All pictures as one tensor. Raises OutOfMemory."""
        with out_of_memory():
            images = torch.empty(len(self), self.channels, *self.size, dtype=torch.uint8)
            for part in torch.arange(len(self)).split(64):
                images[part] = self.pictures(part)
        captions = None if self.captions is None else list(self.captions)
        digests = torch.from_numpy(digests_of(images.numpy()))
        return DataSet(self.name, images, None, None, captions, self.levels, digests, self.notes)

    def to_float(self, values: Tensor) -> Tensor:
        """Convert values 0 … 255 to float32 in [-1, 1], on the same device."""
        return values.float() / ((self.levels - 1) / 2) - 1

    def on(self, device: torch.device) -> ShardedData:
        """The same data: they are read on the CPU."""
        return self

    def split(self, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
        """(train, test), as `DataSet.split`: LongTensors of picture numbers, by the hash of each picture's values."""
        n, keys = len(self), self.index.held_out
        cut = round(held_out * n)
        if not cut and held_out > 0 and n > 1:
            cut = 1
        if not cut:
            return torch.arange(n), torch.arange(0)
        last = np.partition(keys, cut - 1)[cut - 1]
        test = keys <= last  # equal pictures stay together
        if test.all():
            test = np.arange(n) < cut
        return torch.from_numpy(np.flatnonzero(~test)), torch.from_numpy(np.flatnonzero(test))

    def shard_bounds(self, pictures: Tensor) -> Tensor:
        """LongTensor [S + 1]: where each shard begins among these pictures, ascending numbers, and their count."""
        shards = self.index.shard[pictures.numpy()]
        return torch.from_numpy(np.searchsorted(shards, np.arange(len(self.index.about["shards"]) + 1)))

    def about(self) -> dict[str, Any]:
        """The description of the data for run.json."""
        fingerprint = hashlib.sha256(f"{self.index.about['fingerprint']} {self.size} {self.mode}".encode())
        return described(self, fingerprint.hexdigest())


def open_shards(
    store: Storage, size: tuple[int, int] | None, channels: int | None, cache: float, progress: Progress | None
) -> ShardedData:
    """Open a set of shards; one without an index is indexed first. `cache` is in bytes. Raises InputError."""
    shards = ShardCache(store, cache)
    index = open_index(store, shards.path)
    if index is None:
        write_index(store, progress)
        index = open_index(store, shards.path)
        assert index is not None
    return ShardedData(store, index, shards, size, channels)
