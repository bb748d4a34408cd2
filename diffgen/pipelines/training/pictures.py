"""The data of a fine-tuning: captioned pictures of several sizes, each brought to the bucket of its shape.

A bucket is a size that has about as many pixels as the model's own square. A picture goes to the one of the nearest
aspect ratio: it is scaled to cover it, and cropped. Nothing here changes with the step; what a step draws (caption,
crop, mirror) is in `finetune.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffgen.errors import InputError
from diffgen.images.read import read_image, read_kind
from diffgen.models.gate import Checked, sha256_of
from diffgen.models.info import info
from diffgen.training.data.dataset import Captions, Progress
from diffgen.training.data.decode import WORKERS
from diffgen.training.data.folder import list_folder

from .. import sizes
from .finetune_config import FineData, FineTuneConfig, check_base

SMALL_MODEL = 256  # pixels: below it, buckets are as fine as the network allows
CROPPED = 0.15  # the share of a picture that may be lost without a note
Size = tuple[int, int]  # (width, height)


@dataclass(frozen=True)
class Example:
    """A picture, before any is decoded."""

    file: Path
    sha256: str
    size: Size  # upright
    bucket: Size
    captions: Captions
    mask: Path | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Crop:
    """The pixels of a picture as the network shall see them."""

    pixels: np.ndarray  # uint8 [h, w, 3]
    mask: np.ndarray | None  # float32 [h, w], 1 where it matters
    corner: tuple[int, int]  # (top, left) of the crop in the scaled picture


class Pictures:
    """Captioned pictures with their buckets. `open_pictures` makes one."""

    def __init__(self, name: str, examples: list[Example], square: int, notes: tuple[str, ...]) -> None:
        self.name, self.examples, self.square, self.notes = name, examples, square, notes

    def __len__(self) -> int:
        return len(self.examples)

    captions: list[Captions] | None = None  # of the protocol: the job reads those of the examples

    def crop(self, index: int, place: tuple[float, float] = (0.5, 0.5), mirrored: bool = False) -> Crop:
        """A picture scaled to cover its bucket and cropped at a place, each coordinate from 0 to 1."""
        example = self.examples[index]
        image = read_image(example.file)
        width, height = example.bucket
        scale = max(width / image.width, height / image.height)
        scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = (round(share * (a - b)) for share, a, b in zip(place, scaled, example.bucket, strict=True))
        box = left, top, left + width, top + height

        def cut(picture: Image.Image) -> np.ndarray:
            if picture.size != scaled:
                picture = picture.resize(scaled, Image.Resampling.LANCZOS)
            picture = picture.crop(box)
            return np.array(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture)

        mask = None if example.mask is None else cut(read_image(example.mask, "L")).astype(np.float32) / 255
        return Crop(cut(image), mask, (top, left))

    def about(self) -> dict[str, Any]:
        """The description for run.json."""
        counts = Counter(example.bucket for example in self.examples)
        digest = hashlib.sha256()
        for example in self.examples:
            mask = None if example.mask is None else sha256_of(example.mask)
            line = [example.sha256, list(example.bucket), example.captions, mask, example.held_out]
            digest.update(json.dumps(line).encode())
        return {
            "name": self.name,
            "channels": 3,
            "size": [self.square, self.square],
            "classes": None,
            "count": len(self),
            "buckets": {f"{width}x{height}": n for (width, height), n in sorted(counts.items())},
            "fingerprint": digest.hexdigest(),
        }


def buckets(square: int, step: int, aspect: float) -> list[Size]:
    """The sizes in steps of `step` with at most square² pixels and at most that aspect ratio, narrow ones first."""
    sides = (max(square // step, 1) * step,) * 2
    choices = {sides}
    for width in range(step, int(square * math.sqrt(aspect)) + step + 1, step):
        height = square * square // width // step * step
        if height and max(width / height, height / width) <= aspect:
            choices.add((width, height))
    return sorted(choices, key=lambda size: size[0] / size[1])


def nearest(size: Size, choices: list[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of a picture."""
    ratio = math.log(size[0] / size[1])
    return min(choices, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))


def open_pictures(folder: str, config: FineTuneConfig, where: str, progress: Progress | None = None) -> Pictures:
    """List, check and decode the pictures of a folder, before a model is loaded.

    Raises InputError for a broken picture, captions without pictures, masks of another size, an empty folder, and a
    folder without captions where the configuration has none either.
    """
    model, checked = check_base(config.model)
    return read_pictures(Path(folder), config.data, square_of(config.data, model, checked), checked, progress)


def square_of(data: FineData, model: Any, checked: Checked) -> int:
    """The side in pixels of the square that all buckets have about as many pixels as."""
    width, height = sizes.own_size(model, info(model), checked)
    side = data.size or round(math.sqrt(width * height))
    return max(side // sizes.multiple(checked), 1) * sizes.multiple(checked)


def read_pictures(folder: Path, data: FineData, square: int, checked: Checked, progress: Progress | None) -> Pictures:
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}", "give a folder of pictures")
    listing = list_folder(folder, texts=True)
    factor = sizes.multiple(checked)
    step = data.step or (factor if square < SMALL_MODEL else math.lcm(factor, 64))
    if step % factor:
        raise InputError(f"data.step is {step}, this model makes multiples of {factor}", f"a multiple of {factor}")
    choices = buckets(square, step, data.aspect)
    captions = _captioned(listing.captions, data, len(listing.files), folder)
    masks = listing.masks or [None] * len(listing.files)
    paths = [folder / file for file in listing.files]

    def read(i: int) -> tuple[Size, str]:
        size = read_image(paths[i]).size  # decodes it: a broken file is an error now
        if (mask := masks[i]) is not None and read_kind(folder / mask)[:2] != size:
            other = "x".join(map(str, read_kind(folder / mask)[:2]))
            raise InputError(f"{folder / mask}: the mask has {other} pixels, {paths[i].name} {size[0]}x{size[1]}")
        return size, sha256_of(paths[i])

    examples, cropped = [], []
    with ThreadPoolExecutor(WORKERS) as pool:
        for i, (size, sha256) in enumerate(pool.map(read, range(len(paths)))):
            bucket = nearest(size, choices)
            kept = min(size[0] / size[1], bucket[0] / bucket[1]) / max(size[0] / size[1], bucket[0] / bucket[1])
            if 1 - kept > CROPPED:
                cropped.append(listing.files[i])
            mask = masks[i]
            examples.append(
                Example(
                    paths[i],
                    sha256,
                    size,
                    bucket,
                    captions[i],
                    None if mask is None else folder / mask,
                    bool(listing.held_out and listing.held_out[i]),
                )
            )
            if progress is not None:
                progress(i + 1, len(paths))
    notes = list(listing.notes)
    if cropped:
        more = f" and {len(cropped) - 3} more" if len(cropped) > 3 else ""
        notes.append(f"more than {CROPPED:.0%} is cropped from {', '.join(cropped[:3])}{more}")
    return Pictures(folder.resolve().name, examples, square, tuple(notes))


def _captioned(captions: list[Captions] | None, data: FineData, count: int, folder: Path) -> list[Captions]:
    """The captions of each picture, with the trigger in front. Raises InputError if there are none."""
    if captions is None:
        common = data.caption if data.caption is not None else data.trigger
        if not common:
            raise InputError(
                f"{folder} has no captions",
                "add --trigger WORD, a.txt beside each a.png, or a metadata.jsonl; data.caption is one for all",
            )
        captions = [((common, 1.0),)] * count

    def triggered(text: str) -> str:
        return text if not data.trigger or data.trigger in text else f"{data.trigger} {text}".strip()

    return [tuple((triggered(text), weight) for text, weight in each) for each in captions]
