"""The one reader of pictures. A file from anywhere is judged by its header before it may cost memory."""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from diffgen.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 8192 * 8192  # 64 MP
MAX_BYTES = 512 * 2**20  # of the file

ORIENTATION = 0x0112  # EXIF; from 5 on the stored picture lies on its side


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """The picture in a PNG, JPEG or WebP file (by content, whatever its name), upright, without its metadata.

    `mode` is RGB, L (grey) or RGBA. Without an alpha channel, transparent pixels are laid on white; 16-bit grey is
    scaled to 8 bits. Refused with InputError: what is not a regular file, more than 64 MP (by the header, before
    decoding), animations, truncated and broken files.
    """
    with _opened(Path(path)) as image:
        converted = _converted(ImageOps.exif_transpose(image), mode)
        return Image.frombytes(mode, converted.size, converted.tobytes())  # a fresh image carries no `info`


def read_kind(path: str | Path) -> tuple[int, int, str]:
    """(width, height, mode) of a picture by its header: upright; L, RGB, or RGBA if any pixel may be transparent.

    Same checks as `read_image`, but for the pixels, which are not decoded.
    """
    with _opened(Path(path)) as image:
        size = image.size[::-1] if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else image.size
        grey = image.mode in ("1", "L") or image.mode.startswith("I")
        return *size, "RGBA" if image.has_transparency_data else "L" if grey else "RGB"


def read_texts(path: str | Path) -> dict[str, str]:
    """The texts that a picture carries beside its pixels, by keyword (PNG text chunks). Same checks as `read_image`."""
    with _opened(Path(path)) as image:
        image.load()  # text chunks may also follow the pixels
        return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The opened, not yet decoded picture; every refusal, also one while decoding, becomes InputError."""
    hint = "give a PNG, JPEG or WebP picture"
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read the picture {path}: {reason}", hint) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InputError(f"cannot read the picture {path}: not a regular file", hint)
    with open(descriptor, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures (our limit is lower) and of broken metadata
        if status.st_size > MAX_BYTES:
            raise InputError(f"cannot read the picture {path}: it has {status.st_size} bytes, at most {MAX_BYTES}")
        try:
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"the picture {path} is too large: {width}x{height} pixels, at most {MAX_PIXELS // 2**20} MP",
                    "make it smaller first",
                )
            # A JPEG with several pictures (format MPO) is a photo with previews or a depth map: its first is the photo.
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":
                raise InputError(f"the picture {path} is an animation of {frames} frames", hint)
            yield image
        except (InputError, MemoryError):
            raise
        except Exception as error:  # a decoder may raise anything on hostile bytes
            raise InputError(f"cannot read the picture {path}: {_reason(error)}", hint) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no PNG, JPEG or WebP file, or its header is broken"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has far more than {MAX_PIXELS // 2**20} MP"
    return f"it is truncated or broken ({error})"


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert(mode)
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)
