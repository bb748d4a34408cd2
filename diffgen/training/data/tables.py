"""Data sets in parquet and Arrow tables, as the Hub and `datasets` write them: pictures with classes or captions.

    mnist/mnist/train-00000-of-00001.parquet      a file; or its folder, of which the part `train` is read
    cats/state.json, data-00000-of-00001.arrow    what `datasets.Dataset.save_to_disk` writes
    cats/dataset_dict.json, train/state.json, …   the same for several parts: `train` is read

They are read whole. Parquet files without classes that are larger than memory are read as shards: `shards`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffgen.devices import out_of_memory
from diffgen.errors import InputError
from diffgen.images.pixels import MODES
from diffgen.models.gate import read_json

from .arrays import by_class
from .dataset import DataSet, Progress, digests_of
from .decode import common_kind, decode
from .index import arrow

LABELS = ("label", "labels", "fine_label", "class")
TEXTS = ("text", "caption", "prompt")
PART = re.compile(r"(train|test|validation|valid|val|dev)\b.*")
SAVED = "state.json"


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether `read_table` reads the path: a parquet file, a folder of `save_to_disk`, or parquet with classes."""
    if os.path.isfile(path):
        return os.fspath(path).endswith(".parquet")
    if not os.path.isdir(path):
        return False
    folder = Path(path)
    if any((folder / name).is_file() for name in ("dataset_dict.json", SAVED)):
        return True
    files = _parquet_files(folder)
    return bool(files) and _label_column(_schema(files[0])) is not None


def read_table(
    path: Path, size: tuple[int, int] | None, channels: int | None, progress: Progress | None = None
) -> DataSet:
    """The data set in that file or folder. Arguments and errors are those of `open_data`."""
    files, notes = _files(path)
    schema = _schema(files[0])
    image, label = _image_column(schema, files[0]), _label_column(schema)
    text = next((name for name in TEXTS if name in schema.names), None)
    columns = [name for name in (image, label, text) if name is not None]
    pictures: list[bytes] = []
    labels: list[Any] = []
    texts: list[Any] = []
    for file in files:
        for row in _rows(file, columns):
            data = (row[image] or {}).get("bytes") if isinstance(row[image], dict) else row[image]
            if not isinstance(data, bytes):
                raise InputError(f"{file}, row {len(pictures)}: the picture is not in the table", "embed the pictures")
            pictures.append(data)
            labels.append(None if label is None else row[label])
            texts.append(None if text is None else row[text])
    if not pictures:
        raise InputError(f"{path}: there is no picture in it")
    if text is not None and not all(isinstance(each, str) for each in texts):
        raise InputError(f"{path}: the column {text!r} has rows without a text")
    size, mode, more = common_kind(pictures, size, channels, str(path))
    with out_of_memory():
        images = torch.empty((len(pictures), {m: c for c, m in MODES.items()}[mode], *size), dtype=torch.uint8)
    for i, values in enumerate(decode(pictures, size, mode, progress)):
        images[i] = torch.from_numpy(values)
    numbers, classes = (
        (None, None) if label is None else by_class(_numbers(labels, path), _names(schema, label), str(path))
    )
    return DataSet(
        path.resolve().name,
        images,
        None if numbers is None else torch.from_numpy(numbers),
        classes,
        None if text is None else [((each, 1.0),) for each in texts],
        256,
        torch.from_numpy(digests_of(images.numpy())),
        (*notes, *more),
    )


def _numbers(labels: list[Any], path: Path) -> np.ndarray:
    """int64 [N]. Raises InputError unless all are whole numbers."""
    if wrong := [each for each in labels if type(each) is not int or not -(2**62) < each < 2**62]:
        raise InputError(
            f"{path}: the label {str(wrong[0])[:80]!r} is not a whole number", "labels are numbers of classes"
        )
    return np.array(labels, dtype=np.int64)


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """(the files to read, notes): of several parts, the one called train."""
    if path.is_file():
        return [path], []
    if (path / "dataset_dict.json").is_file():
        parts = read_json(path / "dataset_dict.json").get("splits")
        names = [name for name in parts if isinstance(name, str)] if isinstance(parts, list) else []
        names = [name for name in names if Path(name).name == name and (path / name / SAVED).is_file()]
        if not names:
            raise InputError(f"{path} has no part with a {SAVED}")
        part = "train" if "train" in names else names[0]
        others = [name for name in names if name != part]
        files, _ = _files(path / part)
        return files, [f"left out: {', '.join(others)}"] if others else []
    if (path / SAVED).is_file():
        entries: Any = read_json(path / SAVED).get("_data_files")
        entries = entries if isinstance(entries, list) else []
        file_names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        files = [path / name for name in file_names if isinstance(name, str) and Path(name).name == name]
        if not files or not all(file.is_file() for file in files):
            raise InputError(f"{path}: {SAVED} names files that are not there")
        return files, []
    files = _parquet_files(path)
    training = [file for file in files if _part(file) in ("train", None)]
    left_out = sorted({str(_part(file)) for file in files if file not in training})
    if not training:
        raise InputError(f"{path} has only the parts {', '.join(left_out)}", "give one of its files")
    return training, [f"left out: {', '.join(left_out)}"] if left_out else []


def _part(file: Path) -> str | None:
    match = PART.fullmatch(file.name)
    return match[1] if match else None


def _parquet_files(folder: Path) -> list[Path]:
    for place in (folder, folder / "data"):
        if files := sorted(place.glob("*.parquet")):
            return files
    return []


def _open(file: Path) -> Any:
    """A parquet file, or a reader of a file of `save_to_disk`: an Arrow stream. Raises InputError."""
    parquet = arrow()
    try:
        if file.suffix == ".parquet":
            return parquet.ParquetFile(file)
        import pyarrow

        return pyarrow.ipc.open_stream(pyarrow.memory_map(os.fspath(file)))
    except Exception as error:  # pyarrow's own, on broken bytes
        raise InputError(f"{file} is broken: {error}") from error


def _schema(file: Path) -> Any:
    opened = _open(file)
    return opened.schema_arrow if file.suffix == ".parquet" else opened.schema


def _rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file, these columns of them. Raises InputError."""
    opened = _open(file)
    try:
        batches = opened.iter_batches(256, columns=columns) if file.suffix == ".parquet" else opened
        for batch in batches:
            yield from batch.select(columns).to_pylist()
    except Exception as error:  # as above
        raise InputError(f"{file} is broken: {error}") from error


def _image_column(schema: Any, file: Path) -> str:
    """The first column with pictures: a struct that has bytes, or bytes that `datasets` calls a picture."""
    features = _features(schema)
    for field in schema:
        kind = str(field.type)
        is_image = isinstance(features.get(field.name), dict) and features[field.name].get("_type") == "Image"
        if (kind.startswith("struct") and "bytes: binary" in kind) or is_image:
            return str(field.name)
    raise InputError(f"{file} has no column of pictures: it has {', '.join(schema.names)[:200]}")


def _label_column(schema: Any) -> str | None:
    """The column with numbers of classes; None if there is none."""
    features = _features(schema)
    named = [name for name, entry in features.items() if isinstance(entry, dict) and entry.get("_type") == "ClassLabel"]
    integers = [field.name for field in schema if str(field.type).startswith(("int", "uint"))]
    preferred = [name for name in LABELS if name in integers]
    return next(
        iter([name for name in preferred if name in named] or [n for n in named if n in integers] or preferred), None
    )


def _names(schema: Any, label: str) -> list[str] | None:
    """The names of the classes that `datasets` wrote into the table."""
    entry = _features(schema).get(label)
    names = entry.get("names") if isinstance(entry, dict) else None
    return [str(name)[:200] for name in names] if isinstance(names, list) and names else None


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` wrote about the columns; empty if there is nothing."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}
