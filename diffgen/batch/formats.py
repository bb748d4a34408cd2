"""The formats of a shard: how its pictures are written, and how they are read again.

    files         00012/000012034.png and 00012/metadata.jsonl (file_name, text, …): Hugging Face's imagefolder
    webdataset    00012.tar with 000012034.png, .txt and .json; 00012.parquet with the descriptions
    parquet       data/train-00012-of-01000.parquet with the column `image`, as `datasets` writes them

A description has key, text, seed, width, height, pixels_sha256, and the row's own options.
"""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffgen.errors import InputError
from diffgen.storage import Storage

from .extras import need
from .maker import Made
from .rows import canonical

ROW_GROUP = 100  # pictures; a group's bytes must stay below 2 GiB, and the Hub's viewer wants few


def description(made: Made) -> dict[str, Any]:
    """What is written about a picture beside it."""
    row = made.row
    return {"key": row.key, "text": row.prompt, "seed": row.seed, **(made.about or {}), **row.options}


class Format(ABC):
    """Writes one shard into a scratch folder; `close` returns its files by their final names."""

    needs_arrow = False

    def __init__(self, folder: Path, shard: int, shards: int) -> None:
        self.folder, self.shard, self.shards = folder, shard, shards

    @abstractmethod
    def add(self, made: Made) -> None: ...

    @abstractmethod
    def close(self) -> dict[str, Path]: ...

    @classmethod
    def check_packages(cls) -> None:
        """Raise UsageError if a package is missing that this format needs."""
        if cls.needs_arrow:
            need("pyarrow.parquet", f"shards of the format {cls.__name__.lower()}")

    @staticmethod
    @abstractmethod
    def names(shard: int, shards: int) -> list[str]:
        """The final names, files or folders, of a shard."""

    @staticmethod
    @abstractmethod
    def read(store: Storage, shard: int, shards: int) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
        """Yield (key, PNG, description) of what a shard has. Raises InputError for a broken shard."""


class Files(Format):
    """A folder with pictures and a metadata.jsonl."""

    def __init__(self, folder: Path, shard: int, shards: int) -> None:
        super().__init__(folder, shard, shards)
        self.own = folder / f"{shard:05}"
        self.own.mkdir()
        self.lines = (self.own / "metadata.jsonl").open("wb")

    def add(self, made: Made) -> None:
        name = f"{made.row.key}.png"
        (self.own / name).write_bytes(made.png)
        self.lines.write(canonical({"file_name": name, **description(made)}) + b"\n")

    def close(self) -> dict[str, Path]:
        self.lines.close()
        return {self.own.name: self.own}

    @staticmethod
    def names(shard: int, shards: int) -> list[str]:
        return [f"{shard:05}"]

    @staticmethod
    def read(store: Storage, shard: int, shards: int) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
        folder = f"{shard:05}"
        sizes = store.sizes(folder)
        pictures = sorted(name for name in sizes if name.endswith(".png"))
        lines: dict[str, Any] = {}
        if "metadata.jsonl" in sizes:
            try:
                entries = [json.loads(line) for line in store.read(f"{folder}/metadata.jsonl").splitlines()]
                lines = {entry["file_name"]: entry for entry in entries}
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{folder}/metadata.jsonl is broken: {error}") from error
        for name, png in store.read_all([f"{folder}/{name}" for name in pictures]):
            file = name.rpartition("/")[2]
            yield file.removesuffix(".png"), png, lines.get(file, {})


class Webdataset(Format):
    """A tar file with members that share a key, and the descriptions as parquet."""

    needs_arrow = True

    def __init__(self, folder: Path, shard: int, shards: int) -> None:
        super().__init__(folder, shard, shards)
        self.tar = tarfile.open(folder / "shard.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.entries: list[dict[str, Any]] = []

    def add(self, made: Made) -> None:
        about = description(made)
        parts = {"png": made.png, "txt": made.row.prompt.encode(), "json": canonical(about)}
        for extension, data in parts.items():
            member = tarfile.TarInfo(f"{made.row.key}.{extension}")
            member.size, member.mode = len(data), 0o644
            self.tar.addfile(member, io.BytesIO(data))
        self.entries.append(about)

    def close(self) -> dict[str, Path]:
        self.tar.close()
        pa, parquet = need("pyarrow", "shards"), need("pyarrow.parquet", "shards")
        columns = dict.fromkeys(name for entry in self.entries for name in entry)
        rows = [{name: _cell(entry.get(name)) for name in columns} for entry in self.entries]
        parquet.write_table(pa.Table.from_pylist(rows), self.folder / "shard.parquet")
        tar, table = self.names(self.shard, self.shards)
        return {tar: self.folder / "shard.tar", table: self.folder / "shard.parquet"}

    @staticmethod
    def names(shard: int, shards: int) -> list[str]:
        return [f"{shard:05}.tar", f"{shard:05}.parquet"]

    @staticmethod
    def read(store: Storage, shard: int, shards: int) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
        name = f"{shard:05}.tar"
        png: dict[str, bytes] = {}
        try:
            with store.open(name) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    opened = tar.extractfile(member)
                    data = b"" if opened is None else opened.read()
                    if extension == "png":
                        png[key] = data
                    elif extension == "json":
                        yield key, png.pop(key, b""), json.loads(data)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise InputError(f"{name} is broken: {error}") from error
        yield from ((key, data, {}) for key, data in png.items())


class Parquet(Format):
    """One table a shard, with the column `image` {bytes, path}, which `datasets` shows as pictures."""

    needs_arrow = True

    def __init__(self, folder: Path, shard: int, shards: int) -> None:
        super().__init__(folder, shard, shards)
        self.writer: Any = None
        self.waiting: list[dict[str, Any]] = []
        self.path = folder / "shard.parquet"

    def add(self, made: Made) -> None:
        about = description(made)
        options = {key: about.pop(key) for key in made.row.options}
        image = {"bytes": made.png, "path": f"{made.row.key}.png"}
        self.waiting.append({"image": image, **about, "options": canonical(options).decode()})
        if len(self.waiting) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        pa, parquet = need("pyarrow", "shards"), need("pyarrow.parquet", "shards")
        names = {"key": pa.string(), "text": pa.string(), "seed": pa.int64(), "width": pa.int64()}
        names |= {"height": pa.int64(), "pixels_sha256": pa.string(), "options": pa.string()}
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        features = {name: {"dtype": str(kind), "_type": "Value"} for name, kind in names.items()}
        about = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
        schema = pa.schema({"image": image, **names}, metadata={"huggingface": json.dumps(about)})
        if self.writer is None:
            self.writer = parquet.ParquetWriter(self.path, schema)
        self.writer.write_table(pa.Table.from_pylist(self.waiting, schema=schema))
        self.waiting = []

    def close(self) -> dict[str, Path]:
        if self.waiting or self.writer is None:
            self._flush()
        self.writer.close()
        return {self.names(self.shard, self.shards)[0]: self.path}

    @staticmethod
    def names(shard: int, shards: int) -> list[str]:
        return [f"data/train-{shard:05}-of-{shards:05}.parquet"]

    @staticmethod
    def read(store: Storage, shard: int, shards: int) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
        (name,) = Parquet.names(shard, shards)
        parquet = need("pyarrow.parquet", "shards of the format parquet")
        try:
            with store.open(name) as file:
                for batch in parquet.ParquetFile(file).iter_batches(batch_size=ROW_GROUP):
                    for row in batch.to_pylist():
                        yield row["key"], row["image"]["bytes"], row
        except InputError:
            raise
        except Exception as error:  # pyarrow's own, on broken bytes
            raise InputError(f"{name} is broken: {error}") from error


def _cell(value: Any) -> Any:
    """A value for a column: lists and tables as JSON."""
    return canonical(value).decode() if isinstance(value, list | dict) else value


FORMATS: dict[str, type[Format]] = {"files": Files, "webdataset": Webdataset, "parquet": Parquet}
