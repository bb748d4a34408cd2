"""Data sets in files of arrays: MNIST's idx, CIFAR's binary version, NPZ without pickles. They are read whole.

    train-images-idx3-ubyte(.gz), train-labels-idx1-ubyte(.gz)      a folder; or the file of the images alone
    data_batch_1.bin … data_batch_5.bin, batches.meta.txt           CIFAR-10's folder
    train.bin, fine_label_names.txt                                 CIFAR-100's folder
    images, labels                                                  an .npz file, uint8 and whole numbers

Only the part for training is read: the test part of MNIST and CIFAR is left out, and a note says so.
"""

from __future__ import annotations

import gzip
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from diffgen.devices import out_of_memory
from diffgen.errors import InputError
from diffgen.images.pixels import MODES

from .dataset import DataSet, Progress, digests_of
from .decode import common_size

IDX = re.compile(r"(?P<part>.+)-images[-.]idx3-ubyte(?P<gz>\.gz)?")
CIFAR10 = re.compile(r"data_batch_\d+\.bin")
MOST = 2**34  # bytes of an array
COMPRESSION = 1040  # deflate's highest ratio
MAX_CLASSES = 100_000
IMAGES = ("images", "x_train", "train_images", "data", "arr_0")  # names of arrays, the first that is there
LABELS = ("labels", "y_train", "train_labels", "arr_1")
NAMES = ("classes", "class_names", "names")
SIDE, CHANNELS = 32, 3  # of CIFAR


@dataclass(frozen=True)
class Arrays:
    """Pictures as they are in the files."""

    images: np.ndarray  # uint8 [N, C, H, W]
    labels: np.ndarray | None = None  # int64 [N]
    classes: list[str] | None = None
    notes: tuple[str, ...] = ()


def is_arrays(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a file or a folder that `read_arrays` reads."""
    if os.path.isfile(path):
        name = os.path.basename(path)
        return name.lower().endswith(".npz") or IDX.fullmatch(name) is not None
    return os.path.isdir(path) and (_idx_file(Path(path)) is not None or bool(_cifar_files(Path(path))))


def read_arrays(
    path: Path, size: tuple[int, int] | None, channels: int | None, progress: Progress | None = None
) -> DataSet:
    """The data set in that file or folder. Arguments and errors are those of `open_data`."""
    with out_of_memory():
        if path.is_dir():
            file = _idx_file(path)
            arrays = read_cifar(path) if file is None else read_idx(file)
        else:
            arrays = read_npz(path) if path.suffix.lower() == ".npz" else read_idx(path)
        return data_set(path.resolve().name, arrays, str(path), size, channels, progress)


def data_set(
    name: str,
    arrays: Arrays,
    where: str,
    size: tuple[int, int] | None,
    channels: int | None,
    progress: Progress | None = None,
) -> DataSet:
    """A data set of arrays, scaled and cropped to a size, and converted to a number of channels. Raises InputError."""
    images, labels = arrays.images, arrays.labels
    if not len(images):
        raise InputError(f"{where}: there is no picture in it")
    count, own_channels, height, width = images.shape
    own, mode = MODES[own_channels], MODES[channels or own_channels]
    size, notes = common_size([(height, width)] * count, where, size)
    if size != (height, width) or mode != own:
        converted = np.empty((count, channels or own_channels, *size), dtype=np.uint8)
        for i, values in enumerate(images):
            picture = Image.fromarray(values[0] if own == "L" else values.transpose(1, 2, 0)).convert(mode)
            if size != (height, width):
                picture = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
            array = np.array(picture)
            converted[i] = array[None] if mode == "L" else array.transpose(2, 0, 1)
            if progress is not None and (i % 256 == 255 or i + 1 == count):
                progress(i + 1, count)
        images = converted
    images = np.require(images, requirements=["C", "W"])
    return DataSet(
        name,
        torch.from_numpy(images),
        None if labels is None else torch.from_numpy(labels),
        arrays.classes,
        None,
        256,
        torch.from_numpy(digests_of(images)),
        (*arrays.notes, *notes),
    )


def by_class(labels: np.ndarray, names: list[str] | None, where: str) -> tuple[np.ndarray, list[str]]:
    """(labels int64 [N], names of the classes); without names, the classes are the numbers that occur.

    Raises InputError for labels that are no whole numbers, or have no name.
    """
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(
            f"{where}: the labels are {labels.dtype} {list(labels.shape)}, not whole numbers, one a picture"
        )
    values, numbers = np.unique(labels, return_inverse=True)
    if names is None:
        if len(values) > MAX_CLASSES:
            raise InputError(f"{where}: {len(values)} different labels, at most {MAX_CLASSES}")
        return numbers.astype(np.int64), [str(value) for value in values]
    if len(values) and not (values[0] >= 0 and values[-1] < len(names)):
        wrong = values[0] if values[0] < 0 else values[-1]
        raise InputError(f"{where}: the label {wrong} has no name: there are {len(names)} classes")
    return labels.astype(np.int64), names


# MNIST


def _idx_file(folder: Path) -> Path | None:
    """The file of the training images in a folder, or of the only images; None if there are none."""
    names = sorted(name for name in os.listdir(folder) if IDX.fullmatch(name))
    return next((folder / name for name in names if name.startswith("train")), folder / names[0] if names else None)


def read_idx(images: Path) -> Arrays:
    """An idx file of pictures, and the file of labels beside it if there is one. Raises InputError.

    The format is that of the MNIST database (LeCun, Cortes & Burges): 0, 0, the type, the number of dimensions, each
    dimension as a big-endian uint32, then the values.
    """
    match = IDX.fullmatch(images.name)
    assert match is not None
    pictures = _idx_array(images, 3)[:, None]
    separators, endings = ("-", "."), ("", ".gz")
    candidates = (f"{match['part']}-labels{dot}idx1-ubyte{end}" for dot in separators for end in endings)
    beside = next((images.parent / name for name in candidates if (images.parent / name).is_file()), None)
    left_out = sorted(name for name in os.listdir(images.parent) if IDX.fullmatch(name) and name != images.name)
    notes = (f"left out: {', '.join(left_out)}",) if left_out else ()
    if beside is None:
        return Arrays(pictures, notes=notes)
    values = _idx_array(beside, 1)
    if len(values) != len(pictures):
        raise InputError(f"{beside} has {len(values)} labels for {len(pictures)} pictures")
    return Arrays(pictures, *by_class(values, None, str(beside)), notes)


def _idx_array(path: Path, dimensions: int) -> np.ndarray:
    """uint8 with so many dimensions. Raises InputError for any other content."""
    try:
        size = path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if head != bytes([0, 0, 8, dimensions]):
                raise InputError(
                    f"{path} is no idx file of uint8 with {dimensions} dimensions: it begins with {head!r}"
                )
            raw = file.read(4 * dimensions)
            shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(0, len(raw), 4))
            length = int(np.prod(shape, dtype=object)) if len(raw) == 4 * dimensions else -1
            if not 0 <= length <= min(MOST, size * COMPRESSION):
                raise InputError(f"{path}: its header names {shape} values, which do not fit in {size} bytes")
            data = file.read(length + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if len(data) != length:
        raise InputError(f"{path} is not complete, or longer than its header says")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


# CIFAR


def _cifar_files(folder: Path) -> list[Path]:
    """The files with training pictures, in order."""
    names = sorted((name for name in os.listdir(folder) if CIFAR10.fullmatch(name)), key=lambda name: (len(name), name))
    if not names and (folder / "train.bin").is_file() and (folder / "fine_label_names.txt").is_file():
        names = ["train.bin"]
    return [folder / name for name in names]


def read_cifar(folder: Path) -> Arrays:
    """CIFAR-10 or CIFAR-100, binary version (Krizhevsky 2009). Raises InputError.

    A picture is its labels (one byte; of CIFAR-100 the coarse, then the fine one), then 3 x 32 x 32 bytes.
    """
    files = _cifar_files(folder)
    hundred = files[0].name == "train.bin"
    names = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    head = 2 if hundred else 1
    row = head + CHANNELS * SIDE * SIDE
    rows = []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        if len(data) % row or not data:
            raise InputError(f"{file} has {len(data)} bytes: not a multiple of {row}, the bytes of a picture")
        rows.append(np.frombuffer(data, dtype=np.uint8).reshape(-1, row))
    values = np.concatenate(rows)
    classes = None
    if names.is_file():
        try:
            classes = names.read_text(encoding="utf-8").split()[:MAX_CLASSES]
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {names}: {error}") from error
    labels, classes = by_class(values[:, head - 1], classes, str(folder))
    test = "test.bin" if hundred else "test_batch.bin"
    notes = (f"left out: {test}",) if (folder / test).is_file() else ()
    return Arrays(values[:, head:].reshape(-1, CHANNELS, SIDE, SIDE), labels, classes, notes)


# NPZ


def read_npz(path: Path) -> Arrays:
    """An .npz file: pictures uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], perhaps labels [N] and names of classes.

    Arrays that hold objects are refused: reading them would run code. Raises InputError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        images_name = next((name for name in IMAGES if name in sizes), None)
        if images_name is None:
            raise InputError(f"{path} has no array of pictures: it has {_listed(sizes)}", f"call it {IMAGES[0]!r}")
        labels_name = next((name for name in LABELS if name in sizes), None)
        names_name = next((name for name in NAMES if name in sizes), None)
        wanted = [name for name in (images_name, labels_name, names_name) if name is not None]
        if large := [name for name in wanted if sizes[name] > MOST]:
            raise InputError(f"{path}: the array {large[0]!r} has {sizes[large[0]]} bytes, at most {MOST}")
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in wanted}
    except InputError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds on broken bytes
        raise InputError(f"cannot read {path}: {error}", "save arrays of numbers with numpy.savez") from error
    images = _pictures(values[images_name], f"{path}: {images_name}")
    left_out = sorted(sizes.keys() - set(wanted))
    notes = (f"left out: {_listed(left_out)}",) if left_out else ()
    if labels_name is None:
        return Arrays(images, notes=notes)
    labels = values[labels_name]
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if len(labels) != len(images) if labels.ndim else True:
        raise InputError(f"{path}: {labels_name} has the shape {list(labels.shape)}, images {list(images.shape)}")
    names = None if names_name is None else [str(name)[:200] for name in values[names_name].ravel()[:MAX_CLASSES]]
    return Arrays(images, *by_class(labels, names, f"{path}: {labels_name}"), notes)


def _pictures(values: np.ndarray, where: str) -> np.ndarray:
    """uint8 [N, C, H, W]"""
    if values.dtype != np.uint8:
        raise InputError(f"{where} is {values.dtype}, not uint8", "save whole numbers from 0 to 255: x.astype('uint8')")
    if values.ndim == 3:
        return values[:, None]
    if values.ndim == 4 and values.shape[3] in MODES:
        return values.transpose(0, 3, 1, 2)
    if values.ndim == 4 and values.shape[1] in MODES:
        return values
    raise InputError(f"{where} has the shape {list(values.shape)}, not [N, H, W], [N, H, W, C] or [N, C, H, W]")


def _listed(names: object) -> str:
    return ", ".join(repr(str(name)[:60]) for name in list(names)[:8]) or "nothing"  # type: ignore[call-overload]
