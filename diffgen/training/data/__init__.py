"""Data to train on: `digits`, which is bundled, or a folder of pictures, as one uint8 tensor.

    data = open_data("digits")
    train, test = data.split()
    x0 = data.to_float(data.images[train[:32]])          # [32, 1, 8, 8] in [-1, 1]

A folder holds PNG, JPEG and WebP files: all in one place; or in subfolders, one for each class; or with a
`metadata.jsonl` or `metadata.csv`: each line names a picture (`file_name`) and may caption it (`text`). A line of JSON
may give several captions (`text` is a list), how often each is drawn (`weights`, as many positive numbers), and keep
the picture out of the training (`"held_out": true`).

MNIST's idx files, CIFAR's binary version and NPZ files are read too (`arrays`), as are parquet files with classes and
folders that `datasets` saved (`tables`).

A set of shards, which are tar or parquet files or the output of `diffgen batch`, here or on a store that fsspec knows,
can be larger than memory: `open_training_data` reads its index (`index.write_index`) and the pictures of a step.

`dataset.TrainingData` is all that a training job needs: data that are computed, rather than read, can implement it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffgen.errors import InputError, UsageError
from diffgen.images.pixels import MODES
from diffgen.storage import Storage

from .arrays import is_arrays, read_arrays
from .dataset import DataSet, Progress, digests_of
from .decode import MAX_SIDE
from .folder import read_folder
from .index import kind_of_set
from .shards import ShardedData, open_shards
from .tables import is_table, read_table

BUNDLED = {"digits": Path(__file__).parent / "digits" / "digits.safetensors"}
CACHE = 20.0  # GB
MEMORY = ("auto", "ram", "map")


def open_data(
    name_or_folder: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    memory: str = "auto",
    progress: Progress | None = None,
) -> DataSet:
    """Open the bundled data set of that name (`digits`), else a folder or a file; `./digits` is always a folder.

    size        (height, width), or the side of a square: pictures of another size are scaled and cropped in the middle.
                Unless given, all must have the same size
    channels    1 (grey), 3 (RGB) or 4 (RGBA); unless given, the smallest number that holds all pictures
    memory      "ram", or "map" for a file in the user's cache folder, which one process builds once while others wait;
                "auto" maps data of more than 2 GiB
    progress    called with (done, total) while pictures are decoded

    Raises InputError for data that are missing, empty, broken or inconsistent (with the file's name), UsageError for
    an invalid size or number of channels, OutOfMemory, and CannotWrite if the cache cannot be written.
    """
    height_width = _size(size)
    if channels not in (None, *MODES):
        raise UsageError(f"channels must be 1, 3 or 4 (got {channels!r})", "1 is grey, 3 is RGB, 4 is RGBA")
    if memory not in MEMORY:
        raise UsageError(f"memory must be one of {', '.join(MEMORY)} (got {memory!r})")
    name = os.fspath(name_or_folder)
    if name in BUNDLED:
        data = _bundled(name)
        if height_width not in (None, data.size) or channels not in (None, data.channels):
            kind = f"{data.size[1]}x{data.size[0]}, {MODES[data.channels]}"
            raise UsageError(f"{name} is {kind}: it has no other size and no other channels", "leave both out")
        return data
    if is_arrays(name):
        return read_arrays(Path(name), height_width, channels, progress)
    if is_table(name):
        return read_table(Path(name), height_width, channels, progress)
    if is_sharded(name):
        return open_shards(Storage(name), height_width, channels, CACHE * 1e9, progress).in_memory()
    if not os.path.isdir(name):
        raise InputError(*_unknown_name(name))
    return read_folder(Path(name), height_width, channels, memory, progress)


def is_sharded(name: str) -> bool:
    """Whether the name is a folder of shards, or one on a remote store."""
    return "://" in name or (os.path.isdir(name) and kind_of_set(Storage(name)) is not None)


def open_training_data(
    name_or_folder: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    memory: str = "auto",
    cache: float = CACHE,
    progress: Progress | None = None,
) -> DataSet | ShardedData:
    """As `open_data`, but a set of shards stays where it is; `cache` is in GB, for copies of remote shards."""
    name = os.fspath(name_or_folder)
    if name not in BUNDLED and is_sharded(name) and not is_table(name):
        return open_shards(Storage(name), _size(size), channels, cache * 1e9, progress)
    return open_data(name, size=size, channels=channels, memory=memory, progress=progress)


def _size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in pair):
        raise UsageError(f"the size of the pictures must be whole numbers from 1 to {MAX_SIDE} (got {size!r})")
    return pair


def _bundled(name: str) -> DataSet:
    try:
        tensors = load_file(BUNDLED[name])
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the bundled data set {name!r} is not in this installation", "install diffgen again"
        ) from error
    images, labels = tensors["images"], tensors["labels"].long()
    classes = [str(digit) for digit in range(10)]
    return DataSet(name, images, labels, classes, None, 17, torch.from_numpy(digests_of(images.numpy())))


def _unknown_name(name: str) -> tuple[str, str]:
    """(message, hint) for a name that is no data set."""
    choices = f"give a folder of pictures, or a bundled name: {', '.join(BUNDLED)}"
    if os.path.lexists(name):
        return f"{name!r} is neither a folder nor a file of a data set", f"{choices}; or an .npz, idx or parquet file"
    near = difflib.get_close_matches(name.lower(), BUNDLED, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no data set {name!r}", guess + choices
