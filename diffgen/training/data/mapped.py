"""A cache file of decoded images, mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffgen.errors import CannotWrite, InputError
from diffgen.images.publish import cannot_write

from .dataset import Progress, digests_of
from .decode import decode


def mapped_images(
    folder: Path, files: list[str], shape: tuple[int, int, int, int], mode: str, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """(images, digests), mapped from a safetensors file in the cache folder; writes the file if it is missing.

    Its name is a hash of the folder's path, the names, sizes and times of its pictures, and the target kind. The file
    is written under a temporary name and renamed; of several processes, one writes it. Raises CannotWrite, InputError.
    """
    key = hashlib.sha256(json.dumps([os.fspath(folder.resolve()), shape, mode]).encode())
    for file in files:
        status = os.stat(folder / file)
        key.update(json.dumps([file, status.st_size, status.st_mtime_ns]).encode())
    place = user_cache_path("diffgen") / "data"
    path = place / f"{key.hexdigest()[:32]}.safetensors"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            tensors = _open_cache(path, shape)
            if tensors is None:
                _write_cache(path, shape, decode([folder / file for file in files], shape[2:], mode, progress))
                tensors = _open_cache(path, shape)
    except OSError as error:
        hint = "data larger than memory are written to the user's cache folder: make room there"
        raise CannotWrite(cannot_write(path, error).message, hint) from error
    if tensors is None:
        raise InputError(f"{path}: the cache that was just written cannot be read", "remove it, and check the disk")
    return tensors


def _open_cache(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """The tensors of the file, mapped; None if it is missing, or its shapes are wrong."""
    try:
        with safe_open(path, "pt") as file:
            images, digests = file.get_tensor("images"), file.get_tensor("digests").clone()
    except (OSError, SafetensorError):
        return None
    return (images, digests) if images.shape == shape and digests.shape == shape[:1] else None


def _write_cache(path: Path, shape: tuple[int, ...], pictures: Iterator[np.ndarray]) -> None:
    """Write a safetensors file picture by picture, so that memory never holds all of them."""
    end = int(np.prod(shape))
    header = json.dumps(
        {
            "images": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]},
            "digests": {"dtype": "I64", "shape": shape[:1], "data_offsets": [end, end + 8 * shape[0]]},
        }
    ).encode()
    header += b" " * (-(8 + len(header) + end) % 8)  # so that the digests are aligned
    temporary = path.with_suffix(".part")  # the lock lets one process in
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            digests = []
            for picture in pictures:
                file.write(picture.tobytes())
                digests.append(digests_of([picture]))
            file.write(np.concatenate(digests).astype("<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
