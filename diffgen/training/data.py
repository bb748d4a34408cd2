"""Data to train on: `digits`, which is bundled, or a folder of pictures, as one uint8 tensor.

    data = open_data("digits")
    train, test = data.split()
    x0 = data.to_float(data.images[train[:32]])          # [32, 1, 8, 8] in [-1, 1]

A folder holds PNG, JPEG and WebP files: all in one place; or in subfolders, which then are the classes; or with a
`metadata.jsonl` or `metadata.csv`, each line of which names a picture (`file_name`) and may caption it (`text`). A line
of JSON may give several captions (`text` is a list), how often each is drawn (`weights`, as many positive numbers), and
keep the picture out of the training (`"held_out": true`).
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffgen.devices import out_of_memory
from diffgen.errors import CannotWrite, InputError, UsageError
from diffgen.images.pixels import MODES
from diffgen.images.publish import cannot_write
from diffgen.images.read import read_image, read_kind

BUNDLED = {"digits": Path(__file__).parent / "digits" / "digits.safetensors"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".svg")
METADATA = ("metadata.jsonl", "metadata.csv")
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}  # not names of classes
MEMORY = ("auto", "ram", "map")
IN_MEMORY = 2 * 2**30  # bytes of pictures up to which `auto` keeps them all in memory
MAX_SIDE = 1024
MAX_LINE = 64 * 2**10  # characters of a line of the metadata
WORKERS = min(4, os.cpu_count() or 1)

Progress = Callable[[int, int], None]
Captions = tuple[tuple[str, float], ...]  # of one picture: (text, weight), the weights not yet brought to a sum of 1


@dataclass(frozen=True)
class DataSet:
    """Pictures with what is known of them."""

    name: str  # a base name
    images: Tensor  # uint8 [N, C, H, W], on the CPU; possibly mapped from a file
    labels: Tensor | None  # LongTensor [N], numbers of classes
    classes: list[str] | None
    captions: list[Captions] | None
    levels: int  # the values are 0 … levels − 1
    digests: Tensor = field(repr=False)  # int64 [N], a hash of each picture's values
    notes: tuple[str, ...] = ()  # what was done to the pictures, and what was left out
    held_out: Tensor | None = None  # bool [N], where the data says itself what is held out

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.images.shape[2], self.images.shape[3]

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of all that training depends on, in its order: values, classes, captions, what is held out."""
        captions = self.captions
        if captions is not None and all(said == ((said[0][0], 1.0),) for said in captions):
            captions = [said[0][0] for said in captions]  # type: ignore[misc]
        about = [list(self.images.shape), self.levels, self.classes, captions]
        if self.held_out is not None:
            about.append(self.held_out.nonzero().flatten().tolist())
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update(self.digests.numpy().astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """What a run says of its data."""
        return {
            "name": self.name,
            "channels": self.channels,
            "size": list(self.size),
            "classes": self.classes,
            "levels": self.levels,
            "count": len(self),
            "fingerprint": self.fingerprint,
        }

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(train, test): LongTensors of picture numbers, ascending; `test` has the fraction `held_out` of each class.

        By a hash of (seed, the picture's values): the same wherever the data lies, and equal pictures of a class stay
        together. Of two pictures or more, at least one is held out unless `held_out` is 0. Where the data says
        itself what is held out, that counts instead.
        Raises ValueError for a fraction outside [0, 1).
        """
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
        if self.held_out is not None:
            return (~self.held_out).nonzero().flatten(), self.held_out.nonzero().flatten()
        keys = [hashlib.sha256(struct.pack("<qq", seed, d)).digest() for d in self.digests.tolist()]
        labels = [0] * len(self) if self.labels is None else self.labels.tolist()
        groups: dict[int, list[int]] = {}
        for i in sorted(range(len(self)), key=lambda i: (keys[i], i)):
            groups.setdefault(labels[i], []).append(i)
        test = []
        for _, group in sorted(groups.items()):
            cut = round(held_out * len(group))
            while 0 < cut < len(group) - 1 and keys[group[cut]] == keys[group[cut - 1]]:
                cut += 1
            test += group[:cut]
        if not test and held_out > 0 and len(self) > 1:
            test = [min(range(len(self)), key=lambda i: keys[i])]
        held = set(test)
        train = [i for i in range(len(self)) if i not in held]
        return torch.tensor(train, dtype=torch.int64), torch.tensor(sorted(test), dtype=torch.int64)

    def to_float(self, values: Tensor) -> Tensor:
        """Values 0 … levels − 1 to float32 in [-1, 1]: 2·x/(levels − 1) − 1, on the device where they are."""
        return values.float() / ((self.levels - 1) / 2) - 1

    def to_values(self, x: Tensor) -> Tensor:
        """The nearest values, uint8, of floats in [-1, 1]; what lies outside is clipped."""
        return ((x.float() + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).to(torch.uint8)


def open_data(
    name_or_folder: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    memory: str = "auto",
    progress: Progress | None = None,
) -> DataSet:
    """The data set of a bundled name (`digits`), else of a folder; `./digits` is a folder whatever its name.

    size        (height, width), or the side of a square: pictures of another size are scaled and cropped in the middle.
                Unless given, all must have one size
    channels    1 (grey), 3 (RGB) or 4 (RGBA); unless given, the least that holds all pictures
    memory      "ram", or "map" for a file that is built once in the user's cache folder, by one process while others
                wait, and mapped from there; "auto" maps what has more than 2 GiB
    progress    hears (done, total) while pictures are decoded

    Raises InputError for data that is not there, empty, broken or inconsistent (with the file's name), UsageError for
    a size or a number of channels that cannot be, OutOfMemory, and CannotWrite where the cache cannot be written.
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
            said = f"{data.size[1]}x{data.size[0]}, {MODES[data.channels]}"
            raise UsageError(f"{name} is {said}: it has no other size and no other channels", "leave both out")
        return data
    if not os.path.isdir(name):
        raise InputError(*_why_not(name))
    return _folder(Path(name), height_width, channels, memory, progress)


def _size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in pair):
        raise UsageError(f"the size of the pictures must be whole numbers from 1 to {MAX_SIDE} (got {size!r})")
    return pair


def _bundled(name: str) -> DataSet:
    try:
        held = load_file(BUNDLED[name])
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the bundled data set {name!r} is not in this installation", "install diffgen again"
        ) from error
    images, labels = held["images"], held["labels"].long()
    classes = [str(digit) for digit in range(10)]
    return DataSet(name, images, labels, classes, None, 17, torch.from_numpy(_digests(images.numpy())))


def _why_not(name: str) -> tuple[str, str]:
    """What is wrong with a name that is no data set, and what to do."""
    there_are = f"give a folder of pictures, or a bundled name: {', '.join(BUNDLED)}"
    if os.path.lexists(name):
        return f"{name!r} is not a folder", there_are
    near = difflib.get_close_matches(name.lower(), BUNDLED, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no data set {name!r}", guess + there_are


# A folder


@dataclass(frozen=True)
class _Listing:
    """Which pictures a folder has, in the order of their names, before one is opened."""

    files: list[str]  # relative, with /
    labels: list[int] | None
    classes: list[str] | None
    captions: list[Captions] | None
    notes: list[str]
    held_out: list[bool] | None = None


def _folder(
    folder: Path, size: tuple[int, int] | None, channels: int | None, memory: str, progress: Progress | None
) -> DataSet:
    listing = _list(folder)
    size, mode, notes = _kinds([folder / file for file in listing.files], size, channels)
    count = len(listing.files)
    shape = (count, {m: c for c, m in MODES.items()}[mode], *size)
    paths = [folder / file for file in listing.files]
    total = int(np.prod(shape))
    if memory == "ram" or (memory == "auto" and total <= IN_MEMORY):
        with out_of_memory():
            images = torch.empty(shape, dtype=torch.uint8)
        for i, picture in enumerate(_decode(paths, size, mode, progress)):
            images[i] = torch.from_numpy(picture)
        digests = torch.from_numpy(_digests(images.numpy()))
    else:
        images, digests = _mapped(folder, listing.files, shape, mode, progress)
    labels = None if listing.labels is None else torch.tensor(listing.labels, dtype=torch.int64)
    return DataSet(
        folder.resolve().name,
        images,
        labels,
        listing.classes,
        listing.captions,
        256,
        digests,
        (*listing.notes, *notes),
        None if listing.held_out is None else torch.tensor(listing.held_out),
    )


def _list(folder: Path) -> _Listing:
    if (folder / "run.json").is_file():
        raise InputError(f"{folder} is a training run, not data", "give the folder of the pictures")
    found, left_out = _walk(folder)
    notes = [f"left out, for they are no PNG, JPEG or WebP: {_some(left_out)}"] if left_out else []
    metadata = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(metadata) > 1:
        raise InputError(f"{folder} has both {' and '.join(METADATA)}", "keep one of them")
    if metadata:
        return _from_metadata(folder, metadata[0], found, notes)
    if not found:
        instead = f", only {_some(left_out)}" if left_out else ""
        raise InputError(f"{folder}: no picture in it (PNG, JPEG or WebP){instead}", "give a folder of pictures")
    places = Counter(file.split("/")[0] if "/" in file else "" for file in found)
    if len(places) == 1:
        return _Listing(found, None, None, None, notes)
    if "" in places:
        inside = next(place for place in sorted(places) if place)
        raise InputError(
            f"{folder}: {places['']} pictures lie in the folder itself, others in subfolders ({inside})",
            "put all in one place, or each into the subfolder of its class",
        )
    classes = sorted(places)
    if {name.lower() for name in classes} <= PARTS:
        raise InputError(
            f"{folder}: the subfolders {', '.join(classes)} look like parts of a data set, not like classes",
            f"give one of them: {folder / classes[0]}",
        )
    numbers = {name: i for i, name in enumerate(classes)}
    return _Listing(found, [numbers[file.split("/")[0]] for file in found], classes, None, notes)


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """(pictures, pictures of other formats) by the endings of their names, relative, sorted; follows links."""
    found: list[str] = []
    others: list[str] = []
    seen: set[tuple[int, int]] = set()

    def look(place: str, before: str) -> None:
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                name = before + entry.name
                if entry.is_dir():
                    look(entry.path, f"{name}/")
                elif entry.name.lower().endswith(PICTURES):
                    found.append(name)
                elif entry.name.lower().endswith(OTHER_PICTURES):
                    others.append(name)

    try:
        look(os.fspath(folder), "")
    except OSError as error:
        raise InputError(f"cannot read the folder {error.filename or folder}: {error.strerror}") from error
    if bad := next((name for name in found if not _encodes(name)), None):
        raise InputError(f"{folder}: a file's name is not UTF-8: {bad!r}", "rename it")
    return sorted(found), sorted(others)


def _from_metadata(folder: Path, path: Path, found: list[str], notes: list[str]) -> _Listing:
    """The pictures that the metadata names, with its captions if it has any."""
    lines: dict[str, int] = {}
    texts: dict[str, Captions | None] = {}
    held_out: dict[str, bool] = {}
    present = set(found)
    for number, entry in _entries(path):
        where = f"{path}, line {number}"
        file = entry.get("file_name")
        if not isinstance(file, str) or not file:
            raise InputError(f"{where}: no file_name", 'each line is {"file_name": "a.png", "text": "…"}')
        if _escapes(file):
            raise InputError(f"{where}: file_name {file!r} leads out of the folder", "name files inside the folder")
        name = str(PurePosixPath(file))
        if name in lines:
            raise InputError(f"{where}: {name!r} is there already, on line {lines[name]}", "keep one of them")
        if name not in present and not (folder / name).is_file():
            raise InputError(f"{where}: there is no file {name!r} in {folder}")
        lines[name], texts[name] = number, _captions(entry, where)
        if (out := entry.get("held_out")) is not None:
            if type(out) is not bool:
                raise InputError(f"{where}: held_out is {out!r}, not true or false")
            held_out[name] = out
    if not lines:
        raise InputError(f"{path}: it names no picture")
    files = sorted(lines)
    if unnamed := sorted(present - set(files)):
        notes = [*notes, f"left out, for {path.name} does not name them: {_some(unnamed)}"]
    captioned = [name for name in files if texts[name] is not None]
    if captioned and len(captioned) < len(files):
        without = next(name for name in files if texts[name] is None)
        raise InputError(
            f"{path}, line {lines[without]}: {without!r} has no text, {captioned[0]!r} has one",
            'caption all pictures or none; "" is a caption too',
        )
    if held_out and all(held_out.get(name) for name in files):
        raise InputError(f"{path}: all pictures are held out, and none is left to train on")
    captions = [said for name in files if (said := texts[name]) is not None]
    kept_out = [held_out.get(name, False) for name in files] if held_out else None
    return _Listing(files, None, None, captions or None, notes, kept_out)


def _captions(entry: dict[str, Any], where: str) -> Captions | None:
    """What a line says of its picture; None if it says nothing."""
    text, weights = entry.get("text"), entry.get("weights")
    if text is None:
        return None
    said = text if isinstance(text, list) else [text]
    if wrong := [one for one in said if not (isinstance(one, str) and _encodes(one))]:
        raise InputError(f"{where}: the text {wrong[0]!r} is no text")
    if not said:
        raise InputError(f"{where}: the list of texts is empty")
    if weights is None or not isinstance(text, list):
        return tuple((one, 1.0) for one in said)
    numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 < w < 1e9 for w in weights)
    if not numbers or len(weights) != len(said):
        raise InputError(
            f"{where}: weights is {str(weights)[:80]}, not {len(said)} positive numbers, one for each text"
        )
    return tuple(zip(said, map(float, weights), strict=True))


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields) of each line of a metadata file that is not blank."""
    number = 0
    if not path.is_file():
        raise InputError(f"cannot read {path}: not a regular file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    yield reader.line_num, row
                return
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise InputError(f"{path}, line {number}: longer than {MAX_LINE} characters")
                if line.strip():
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise InputError(f"{path}, line {number}: not a JSON object")
                    yield number, entry
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (after line {number})", "save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: broken JSON ({error})") from error
    except csv.Error as error:
        raise InputError(f"{path}: broken CSV ({error})") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _encodes(text: str) -> bool:
    """Whether it has no half of a surrogate pair, as names that are not UTF-8 have and JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escapes(file: str) -> bool:
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    return posix.is_absolute() or bool(windows.anchor) or ".." in windows.parts or "\0" in file


def _kinds(
    paths: list[Path], size: tuple[int, int] | None, channels: int | None
) -> tuple[tuple[int, int], str, list[str]]:
    """((height, width), mode, notes) that all pictures are brought to. Every header is read, so that a broken file is
    found at once."""
    with ThreadPoolExecutor(WORKERS) as pool:
        kinds = list(pool.map(read_kind, paths))
    sizes = Counter((height, width) for width, height, _ in kinds)
    if size is None:
        if len(sizes) > 1:
            sides = [side for pair in sizes for side in pair]
            raise InputError(
                f"the pictures in {paths[0].parent} have {len(sizes)} sizes, with sides from {min(sides)} to "
                f"{max(sides)} pixels",
                f"choose one for all, such as size = {min(min(sides), 64)}: they are scaled and cropped in the middle",
            )
        size = next(iter(sizes))
        if max(size) > MAX_SIDE:
            raise InputError(
                f"the pictures have {size[1]}x{size[0]} pixels: a side is at most {MAX_SIDE}",
                "choose a size, such as size = 64: they are scaled and cropped in the middle",
            )
    notes = []
    if other := len(paths) - sizes[size]:
        notes.append(f"{other} of {len(paths)} pictures scaled and cropped to {size[1]}x{size[0]}")
    small = sum(n for (height, width), n in sizes.items() if height < size[0] or width < size[1])
    if small:
        notes.append(f"{small} of {len(paths)} pictures were smaller and are enlarged")
    modes = Counter(mode for _, _, mode in kinds)
    mode = MODES[channels] if channels else next(m for m in ("RGBA", "RGB", "L") if modes[m])
    if len(modes) > 1:
        notes.append(f"pictures of several kinds ({', '.join(sorted(modes))}) all read as {mode}")
    return size, mode, notes


def _decode(
    paths: list[Path], size: tuple[int, int], mode: str, progress: Progress | None = None
) -> Iterator[np.ndarray]:
    """The pictures, uint8 [C, H, W], in their order, decoded by a few threads a little ahead."""

    def one(path: Path) -> np.ndarray:
        image = read_image(path, mode)
        if image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
        values = np.array(image)
        return np.ascontiguousarray(values[None] if mode == "L" else values.transpose(2, 0, 1))

    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for some in _batches(paths, 64):
            for picture in pool.map(one, some):
                yield picture
                done += 1
                if progress is not None:
                    progress(done, len(paths))


def _batches(items: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _digests(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """int64 [N]: the first eight bytes of each picture's SHA-256."""
    hashes = [hashlib.sha256(picture.tobytes()).digest()[:8] for picture in pictures]
    return np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64)


# Data that does not fit into memory


def _mapped(
    folder: Path, files: list[str], shape: tuple[int, int, int, int], mode: str, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """(images, digests), mapped from a safetensors file in the cache folder, which is made first unless it is there.

    The file is found by the folder's path, the names, sizes and times of its pictures, and by what they are made into.
    It is written under another name and renamed; of several processes, one makes it.
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
            held = _open_cache(path, shape)
            if held is None:
                _write_cache(path, shape, _decode([folder / file for file in files], shape[2:], mode, progress))
                held = _open_cache(path, shape)
    except OSError as error:
        hint = "data that does not fit into memory goes to the user's cache folder: make room there"
        raise CannotWrite(cannot_write(path, error).message, hint) from error
    if held is None:
        raise InputError(f"{path}: the cache that was just written cannot be read", "remove it, and look at the disk")
    return held


def _open_cache(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """What the file holds, not yet read but mapped; None if it is not there, or not what was to be written."""
    try:
        with safe_open(path, "pt") as file:
            images, digests = file.get_tensor("images"), file.get_tensor("digests").clone()
    except (OSError, SafetensorError):
        return None
    return (images, digests) if images.shape == shape and digests.shape == shape[:1] else None


def _write_cache(path: Path, shape: tuple[int, ...], pictures: Iterator[np.ndarray]) -> None:
    """A safetensors file, written picture by picture: it never lies in memory whole."""
    end = int(np.prod(shape))
    header = json.dumps(
        {
            "images": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]},
            "digests": {"dtype": "I64", "shape": shape[:1], "data_offsets": [end, end + 8 * shape[0]]},
        }
    ).encode()
    header += b" " * (-(8 + len(header) + end) % 8)  # so that the digests are aligned
    temporary = path.with_suffix(".part")  # one process at a time is here
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            digests = []
            for picture in pictures:
                file.write(picture.tobytes())
                digests.append(_digests([picture]))
            file.write(np.concatenate(digests).astype("<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _some(names: list[str]) -> str:
    """The first three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(itertools.islice(names, 3)) + more
