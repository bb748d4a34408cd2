"""List a folder of images: class subfolders, metadata, captions."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from diffgen.devices import out_of_memory
from diffgen.errors import InputError
from diffgen.images.pixels import MODES
from diffgen.models.gate import read_bytes

from .dataset import Captions, DataSet, Progress, digests_of
from .decode import common_kind, decode
from .mapped import mapped_images

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".svg")
METADATA = ("metadata.jsonl", "metadata.csv")
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}  # not names of classes
IN_MEMORY = 2 * 2**30  # bytes; memory="auto" maps larger images
MAX_LINE = 64 * 2**10  # characters of a line of the metadata


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder, in the order of their names, before any is opened."""

    files: list[str]  # relative, with /
    labels: list[int] | None
    classes: list[str] | None
    captions: list[Captions] | None
    notes: list[str]
    held_out: list[bool] | None = None
    masks: list[str | None] | None = None  # relative; the part of a picture that matters


def read_folder(
    folder: Path, size: tuple[int, int] | None, channels: int | None, memory: str, progress: Progress | None
) -> DataSet:
    """The pictures of a folder, brought to one size and one number of channels. Arguments and errors: `open_data`."""
    listing = list_folder(folder)
    size, mode, notes = common_kind([folder / file for file in listing.files], size, channels, str(folder))
    count = len(listing.files)
    shape = (count, {m: c for c, m in MODES.items()}[mode], *size)
    paths = [folder / file for file in listing.files]
    total = int(np.prod(shape))
    if memory == "ram" or (memory == "auto" and total <= IN_MEMORY):
        with out_of_memory():
            images = torch.empty(shape, dtype=torch.uint8)
        for i, picture in enumerate(decode(paths, size, mode, progress)):
            images[i] = torch.from_numpy(picture)
        digests = torch.from_numpy(digests_of(images.numpy()))
    else:
        images, digests = mapped_images(folder, listing.files, shape, mode, progress)
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


def list_folder(folder: Path, texts: bool = False) -> Listing:
    """List the pictures of a folder, with their classes or captions. Raises InputError.

    With `texts`, a.txt beside a.png is its caption where there are no metadata, and subfolders are no classes.
    """
    if (folder / "run.json").is_file():
        raise InputError(f"{folder} is a training run, not data", "give the folder of pictures that it was trained on")
    pictures, left_out = _walk(folder)
    notes = [f"left out, because they are not PNG, JPEG or WebP: {_some(left_out)}"] if left_out else []
    metadata = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(metadata) > 1:
        raise InputError(f"{folder} has both {' and '.join(METADATA)}", "keep one of them")
    if metadata:
        return _from_metadata(folder, metadata[0], pictures, notes)
    if not pictures:
        instead = f", only {_some(left_out)}" if left_out else ""
        raise InputError(f"{folder}: no picture in it (PNG, JPEG or WebP){instead}", "give a folder of pictures")
    if texts:
        return Listing(pictures, None, None, _from_texts(folder, pictures), notes)
    places = Counter(file.split("/")[0] if "/" in file else "" for file in pictures)
    if len(places) == 1:
        return Listing(pictures, None, None, None, notes)
    if "" in places:
        inside = next(place for place in sorted(places) if place)
        raise InputError(
            f"{folder}: {places['']} pictures lie in the folder itself, others in subfolders ({inside})",
            "put all of them in one place, or each into the subfolder of its class",
        )
    classes = sorted(places)
    if {name.lower() for name in classes} <= PARTS:
        raise InputError(
            f"{folder}: the subfolders {', '.join(classes)} look like parts of a data set, not like classes",
            f"give one of them: {folder / classes[0]}",
        )
    numbers = {name: i for i, name in enumerate(classes)}
    return Listing(pictures, [numbers[file.split("/")[0]] for file in pictures], classes, None, notes)


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """(pictures, pictures of other formats), by file extension: relative paths, sorted. Follows links."""
    pictures: list[str] = []
    others: list[str] = []
    visited: set[tuple[int, int]] = set()

    def visit(folder_path: str, prefix: str) -> None:
        status = os.stat(folder_path)
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder_path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                name = prefix + entry.name
                if entry.is_dir():
                    visit(entry.path, f"{name}/")
                elif entry.name.lower().endswith(PICTURES):
                    pictures.append(name)
                elif entry.name.lower().endswith(OTHER_PICTURES):
                    others.append(name)

    try:
        visit(os.fspath(folder), "")
    except OSError as error:
        raise InputError(f"cannot read the folder {error.filename or folder}: {error.strerror}") from error
    if bad := next((name for name in pictures if not _encodes(name)), None):
        raise InputError(f"{folder}: a file's name is not UTF-8: {bad!r}", "rename it")
    return sorted(pictures), sorted(others)


def _from_texts(folder: Path, pictures: list[str]) -> list[Captions] | None:
    """The captions in the text files beside the pictures; None if there are none. Raises InputError."""
    texts = {file.relative_to(folder).as_posix() for file in folder.rglob("*.txt") if not file.name.startswith(".")}
    named = {str(PurePosixPath(file).with_suffix(".txt")): file for file in pictures}
    if alone := sorted(texts - named.keys()):
        raise InputError(
            f"{folder}: the caption file {alone[0]} has no picture beside it", "add the picture, or remove the file"
        )
    if texts and (bare := sorted(named.keys() - texts)):
        raise InputError(
            f"{folder}: {named[bare[0]]} has no caption file {bare[0]}, others have one",
            "caption all pictures or none; an empty file is a caption too",
        )
    captions: list[Captions] = []
    for file in pictures if texts else ():
        path = folder / PurePosixPath(file).with_suffix(".txt")
        try:
            captions.append(((read_bytes(path, MAX_LINE).decode("utf-8-sig").strip(), 1.0),))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8", "save it as UTF-8") from error
    return captions or None


def _from_metadata(folder: Path, path: Path, pictures: list[str], notes: list[str]) -> Listing:
    """The pictures that the metadata name, with captions if there are any."""
    lines: dict[str, int] = {}
    texts: dict[str, Captions | None] = {}
    held_out: dict[str, bool] = {}
    masks: dict[str, str] = {}
    present = set(pictures)
    for number, entry in _entries(path):
        where = f"{path}, line {number}"
        file = entry.get("file_name")
        if not isinstance(file, str) or not file:
            raise InputError(f"{where}: no file_name", 'each line is {"file_name": "a.png", "text": "…"}')
        if _escapes(file):
            raise InputError(f"{where}: file_name {file!r} leads out of the folder", "name files inside the folder")
        name = str(PurePosixPath(file))
        if name in lines:
            raise InputError(f"{where}: {name!r} is already on line {lines[name]}", "keep one of them")
        if name not in present and not (folder / name).is_file():
            raise InputError(f"{where}: no file {name!r} in {folder}")
        lines[name], texts[name] = number, _captions(entry, where)
        if (mask := entry.get("mask")) is not None:
            if not isinstance(mask, str) or not mask or _escapes(mask) or not (folder / mask).is_file():
                raise InputError(f"{where}: no mask {str(mask)[:80]!r} in {folder}", "name a file inside the folder")
            masks[name] = str(PurePosixPath(mask))
        if (flag := entry.get("held_out")) is not None:
            if type(flag) is not bool:
                raise InputError(f"{where}: held_out is {flag!r}, not true or false")
            held_out[name] = flag
    if not lines:
        raise InputError(f"{path}: it names no picture")
    files = sorted(lines)
    if unnamed := sorted(present - set(files) - set(masks.values())):
        notes = [*notes, f"left out, because {path.name} does not name them: {_some(unnamed)}"]
    captioned = [name for name in files if texts[name] is not None]
    if captioned and len(captioned) < len(files):
        without = next(name for name in files if texts[name] is None)
        raise InputError(
            f"{path}, line {lines[without]}: {without!r} has no text, {captioned[0]!r} has one",
            'caption all pictures or none; "" is a caption too',
        )
    if held_out and all(held_out.get(name) for name in files):
        raise InputError(f"{path}: all pictures are held out, none is left to train on")
    captions = [text for name in files if (text := texts[name]) is not None]
    flags = [held_out.get(name, False) for name in files] if held_out else None
    return Listing(files, None, None, captions or None, notes, flags, [masks.get(n) for n in files] if masks else None)


def _captions(entry: dict[str, Any], where: str) -> Captions | None:
    """The captions in a line of metadata; None if it has none."""
    text, weights = entry.get("text"), entry.get("weights")
    if text is None:
        return None
    texts = text if isinstance(text, list) else [text]
    if wrong := [each for each in texts if not (isinstance(each, str) and _encodes(each))]:
        raise InputError(f"{where}: the text {wrong[0]!r} is not a string in UTF-8")
    if not texts:
        raise InputError(f"{where}: the list of texts is empty")
    if weights is None or not isinstance(text, list):
        return tuple((each, 1.0) for each in texts)
    numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 < w < 1e9 for w in weights)
    if not numbers or len(weights) != len(texts):
        raise InputError(
            f"{where}: weights is {str(weights)[:80]}, not {len(texts)} positive numbers, one for each text"
        )
    return tuple(zip(texts, map(float, weights), strict=True))


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, fields) for each line of a metadata file that is not blank."""
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
    """Whether UTF-8 can encode the text: file names and JSON may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escapes(file: str) -> bool:
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    return posix.is_absolute() or bool(windows.anchor) or ".." in windows.parts or "\0" in file


def _some(names: list[str]) -> str:
    """The first three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(itertools.islice(names, 3)) + more
