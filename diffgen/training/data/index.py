"""An index of a set of pictures in shards: where each picture is, its caption, its hash. It is mapped, not read.

    write_index(Storage("s3://bucket/set"))           # diffgen data index s3://bucket/set
    index = open_index(Storage("s3://bucket/set"))    # None if there is none

A set is a folder with tar files (webdataset: `.png|.jpg|.jpeg|.webp`, and a caption in `.txt` or in the JSON's `text`),
with parquet files that have a column `image` {bytes, path} and perhaps `text`, or with subfolders of pictures that have
a `metadata.jsonl`: what `diffgen batch` writes. `index.safetensors` lies in the set; pictures are numbered by shard,
then by name.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from diffgen.errors import InputError, UsageError
from diffgen.images.read import read_image, read_kind
from diffgen.models.gate import open_file
from diffgen.storage import FOLDER, Storage

from .dataset import Captions, Progress, digests_of

FILE = "index.safetensors"
SCHEMA = "diffgen.index/1"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PARQUET = "parquet shards"


@dataclass(frozen=True)
class Entry:
    """A picture while the set is indexed."""

    name: str
    place: tuple[int, int]  # tar: (offset, bytes); parquet: (row group, row in it); files: (0, bytes)
    data: bytes
    caption: str | None


@dataclass(frozen=True)
class Index:
    """A mapped index."""

    about: Mapping[str, Any]  # kind, shards, shard_bytes, sizes, modes, fingerprint, captioned
    shard: np.ndarray  # int32 [N], ascending
    place: np.ndarray  # int64 [N, 2], as `Entry.place`
    digest: np.ndarray  # int64 [N], of each picture's values
    held_out: np.ndarray  # uint64 [N]: the pictures with the smallest numbers are held out
    ends: np.ndarray  # int64 [N]: where each caption ends
    texts: np.ndarray  # uint8, all captions
    name_ends: np.ndarray  # int64 [N], of a set of files
    names: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.shard)

    def caption(self, i: int) -> str:
        return _text(self.texts, self.ends, i)

    def name(self, i: int) -> str:
        return _text(self.names, self.name_ends, i)


def _text(texts: np.ndarray, ends: np.ndarray, i: int) -> str:
    return bytes(texts[int(ends[i - 1]) if i else 0 : int(ends[i])]).decode()


def kind_of_set(store: Storage) -> tuple[str, list[str]] | None:
    """(tar, parquet or files; the shards) of a set; None if the folder is no set of shards."""
    top = store.sizes()
    if tars := sorted(name for name in top if name.endswith(".tar")):
        return "tar", tars
    for folder in ("", "data"):
        if folder in ("", *top):
            names = top if not folder else store.sizes(folder)
            prefix = f"{folder}/" if folder else ""
            if tables := sorted(f"{prefix}{name}" for name in names if name.endswith(".parquet")):
                return "parquet", tables
    if "plan.json" in top:
        folders = sorted(name for name, size in top.items() if size == FOLDER and name.isdecimal())
        if folders:
            return "files", folders
    return None


def write_index(store: Storage, progress: Progress | None = None) -> Mapping[str, Any]:
    """Open every picture of a set once and write its index; returns what it says. Raises InputError, CannotWrite."""
    kind_and_shards = kind_of_set(store)
    if kind_and_shards is None:
        raise InputError(
            f"{store.place} has no shards", "give a folder of tar or parquet files, or the output of diffgen batch"
        )
    kind, shards = kind_and_shards
    columns: dict[str, list[Any]] = {name: [] for name in ("shard", "place", "digest", "ends", "name_ends")}
    texts, names = bytearray(), bytearray()
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    captioned: bool | None = None
    for number, shard in enumerate(shards):
        for entry in sorted(READERS[kind](store, shard), key=lambda entry: entry.name):
            where = f"{shard}: {entry.name}"
            try:
                width, height, mode = read_kind(entry.data)
                values = np.array(read_image(entry.data, mode))
            except InputError as error:
                raise InputError(f"{where}: {error.message}", error.hint) from error
            sizes[f"{width}x{height}"] += 1
            modes[mode] += 1
            values = values[None] if mode == "L" else values.transpose(2, 0, 1)
            columns["digest"].append(int(digests_of([np.ascontiguousarray(values)])[0]))
            if captioned is not None and captioned != (entry.caption is not None):
                raise InputError(f"{where}: some pictures of this set have a caption, others have none")
            captioned = entry.caption is not None
            texts += (entry.caption or "").encode()
            columns["ends"].append(len(texts))
            columns["shard"].append(number)
            columns["place"].append(entry.place)
            if kind == "files":
                names += entry.name.encode()
                columns["name_ends"].append(len(names))
        if progress is not None:
            progress(number + 1, len(shards))
    if not columns["shard"]:
        raise InputError(f"{store.place}: there is no picture in its {len(shards)} shards")
    digests = np.array(columns["digest"], dtype="<i8")
    about = {
        "schema": SCHEMA,
        "kind": kind,
        "shards": shards,
        "shard_bytes": [sizes_of(store, shards)[name] for name in shards],
        "count": len(digests),
        "sizes": dict(sizes),
        "modes": dict(modes),
        "captioned": bool(captioned),
        "fingerprint": _fingerprint(digests, bytes(texts), columns["ends"]),
    }
    arrays: dict[str, np.ndarray] = {
        "shard": np.array(columns["shard"], dtype=np.int32),
        "place": np.array(columns["place"], dtype=np.int64),
        "digest": digests,
        "held_out": held_out_keys(digests),
        "ends": np.array(columns["ends"], dtype=np.int64),
        "texts": np.frombuffer(bytes(texts), dtype=np.uint8),
        "name_ends": np.array(columns["name_ends"], dtype=np.int64),
        "names": np.frombuffer(bytes(names), dtype=np.uint8),
    }
    store.put(FILE, save(arrays, {"about": json.dumps(about)}))
    return about


def held_out_keys(digests: np.ndarray) -> np.ndarray:
    """uint64 [N]: the order in which `DataSet.split` holds pictures out, from their digests."""
    heads = (hashlib.sha256(struct.pack("<qq", 0, d)).digest()[:8] for d in digests.tolist())
    return np.frombuffer(b"".join(heads), dtype=">u8").astype(np.uint64)


def sizes_of(store: Storage, shards: Sequence[str]) -> dict[str, int]:
    """The present size of each shard: of its file, or of the metadata of a folder."""
    sizes: dict[str, int] = {}
    for folder in sorted({shard.rpartition("/")[0] for shard in shards}):
        listed = store.sizes(folder)
        sizes |= {f"{folder}/{name}".lstrip("/"): size for name, size in listed.items()}
    return {shard: sizes.get(shard, 0) for shard in shards}


def _fingerprint(digests: np.ndarray, texts: bytes, ends: Sequence[int]) -> str:
    """SHA-256 in hex of every picture's hash and of all captions."""
    digest = hashlib.sha256(digests.tobytes())
    digest.update(np.array(ends, dtype="<i8").tobytes())
    digest.update(texts)
    return digest.hexdigest()


def open_index(store: Storage, local: Callable[[str], Path]) -> Index | None:
    """Map the index of a set; None if it has none. `local(name)` is the path of a file of the set on this machine.

    Raises InputError for an index that is broken, or older than a shard.
    """
    if not store.exists(FILE):
        return None
    hint = f"write it again: diffgen data index {store.place}"
    where, path = f"{store.place.rstrip('/')}/{FILE}", local(FILE)
    try:
        about, arrays = _mapped(path)
        if about["schema"] != SCHEMA or len(arrays["shard"]) != about["count"]:
            raise ValueError(f"its schema is {about['schema']!r}")
        index = Index(about, **arrays)
    except Exception as error:  # any byte of the file may be wrong
        raise InputError(f"the index {where} is broken: {error}", hint) from error
    now = sizes_of(store, about["shards"])
    for shard, size in zip(about["shards"], about["shard_bytes"], strict=True):
        if now[shard] != size:
            raise InputError(f"{shard} in {store.place} is not as it was when the set was indexed", hint)
    return index


def _mapped(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the description, the arrays) of a safetensors file; the arrays are mapped."""
    kinds = {"I32": "<i4", "I64": "<i8", "U64": "<u8", "U8": "u1"}
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
            empty = 0 in shape
            arrays[name] = (
                np.empty(shape, kinds[entry["dtype"]])
                if empty
                else np.memmap(path, kinds[entry["dtype"]], "r", start, shape)
            )
    return json.loads(header["__metadata__"]["about"]), arrays


def _tar(store: Storage, shard: str) -> Iterator[Entry]:
    """The pictures of a tar file; files with the same name before the first dot belong together."""
    pictures: dict[str, tuple[tuple[int, int], bytes]] = {}
    captions: dict[str, str] = {}
    try:
        with store.open(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, dot, extension = member.name.partition(".")
                kind = (dot + extension).lower()
                if not member.isfile() or kind not in (*PICTURES, ".txt", ".json"):
                    continue
                opened = tar.extractfile(member)
                data = b"" if opened is None else opened.read()
                if kind == ".txt":
                    captions[key] = data.decode()
                elif kind == ".json":
                    about = json.loads(data)
                    if isinstance(about, dict) and isinstance(about.get("text"), str):
                        captions.setdefault(key, about["text"])
                elif key in pictures:
                    raise InputError(f"{shard}: two pictures are called {key!r}")
                else:
                    pictures[key] = (member.offset_data, member.size), data
    except (tarfile.TarError, ValueError, OSError) as error:
        raise InputError(f"{shard} in {store.place} is broken: {error}") from error
    for key, (place, data) in pictures.items():
        yield Entry(key, place, data, captions.get(key))


def _parquet(store: Storage, shard: str) -> Iterator[Entry]:
    """The pictures of a parquet file, in the order of its rows."""
    parquet = arrow()
    try:
        with store.open(shard) as file:
            table, number = parquet.ParquetFile(file), 0
            if "image" not in table.schema_arrow.names:
                raise InputError(f"{shard} in {store.place} has no column 'image'")
            columns = [name for name in ("image", "text") if name in table.schema_arrow.names]
            for group in range(table.num_row_groups):
                for row, values in enumerate(table.read_row_group(group, columns=columns).to_pylist()):
                    yield Entry(f"{number:012}", (group, row), values["image"]["bytes"], values.get("text"))
                    number += 1
    except InputError:
        raise
    except Exception as error:  # pyarrow's own, on broken bytes
        raise InputError(f"{shard} in {store.place} is broken: {error}") from error


def _files(store: Storage, shard: str) -> Iterator[Entry]:
    """The pictures of a folder, with the captions of its metadata.jsonl."""
    sizes = store.sizes(shard)
    captions: dict[str, str] = {}
    if "metadata.jsonl" in sizes:
        try:
            lines = [json.loads(line) for line in store.read(f"{shard}/metadata.jsonl").splitlines()]
            captions = {line["file_name"]: line["text"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{shard}/metadata.jsonl in {store.place} is broken: {error}") from error
    names = sorted(name for name in sizes if name.lower().endswith(PICTURES))
    for path, data in store.read_all([f"{shard}/{name}" for name in names]):
        name = path.rpartition("/")[2]
        yield Entry(name, (0, len(data)), data, captions.get(name))


READERS: dict[str, Callable[[Storage, str], Iterator[Entry]]] = {"tar": _tar, "parquet": _parquet, "files": _files}


def arrow() -> Any:
    """pyarrow.parquet. Raises UsageError without it."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("parquet shards need the package pyarrow", "pip install 'diffgen[batch]'") from error
    return parquet


class IndexCaptions(Sequence[Captions]):
    """The captions of an index, decoded when they are read."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        return ((self._index.caption(i), 1.0),)
