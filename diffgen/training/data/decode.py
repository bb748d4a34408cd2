"""Decode image files to uint8 arrays of one size."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from diffgen.errors import InputError
from diffgen.images.pixels import MODES
from diffgen.images.read import read_image, read_kind

from .dataset import Progress

MAX_SIDE = 1024
WORKERS = min(4, os.cpu_count() or 1)


def common_kind(
    sources: Sequence[Path] | Sequence[bytes], size: tuple[int, int] | None, channels: int | None, where: str
) -> tuple[tuple[int, int], str, list[str]]:
    """((height, width), mode, notes): the kind that all pictures are converted to; `where` names them in errors.

    Reads every header, so that a broken file is an error at once.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        kinds = list(pool.map(read_kind, sources))
    size, notes = common_size([(height, width) for width, height, _ in kinds], where, size)
    modes = Counter(mode for _, _, mode in kinds)
    mode = MODES[channels] if channels else next(m for m in ("RGBA", "RGB", "L") if modes[m])
    if len(modes) > 1:
        notes.append(f"pictures of several kinds ({', '.join(sorted(modes))}) all read as {mode}")
    return size, mode, notes


def common_size(
    own: Sequence[tuple[int, int]], where: str, size: tuple[int, int] | None
) -> tuple[tuple[int, int], list[str]]:
    """((height, width), notes): the size that all pictures are scaled and cropped to, given their own.

    Raises InputError if they have several and none is chosen.
    """
    sizes = Counter(own)
    if size is None:
        if len(sizes) > 1:
            sides = [side for pair in sizes for side in pair]
            raise InputError(
                f"the pictures in {where} have {len(sizes)} sizes, with sides from {min(sides)} to {max(sides)} pixels",
                f"choose one for all, such as --size {min(min(sides), 64)}: they are scaled and cropped in the middle",
            )
        size = next(iter(sizes))
        if max(size) > MAX_SIDE:
            raise InputError(
                f"the pictures have {size[1]}x{size[0]} pixels: a side is at most {MAX_SIDE}",
                "choose a size, such as --size 64: they are scaled and cropped in the middle",
            )
    notes = []
    if other := len(own) - sizes[size]:
        notes.append(f"{other} of {len(own)} pictures scaled and cropped to {size[1]}x{size[0]}")
    small = sum(n for (height, width), n in sizes.items() if height < size[0] or width < size[1])
    if small:
        notes.append(f"{small} of {len(own)} pictures were smaller and are enlarged")
    return size, notes


def decode(
    sources: Sequence[Path] | Sequence[bytes], size: tuple[int, int], mode: str, progress: Progress | None = None
) -> Iterator[np.ndarray]:
    """Yield the pictures, uint8 [C, H, W], in order; a few threads decode ahead."""

    def read(source: Path | bytes) -> np.ndarray:
        image = read_image(source, mode)
        if image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
        values = np.array(image)
        return np.ascontiguousarray(values[None] if mode == "L" else values.transpose(2, 0, 1))

    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for batch in _batches(sources, 64):
            for picture in pool.map(read, batch):
                yield picture
                done += 1
                if progress is not None:
                    progress(done, len(sources))


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
