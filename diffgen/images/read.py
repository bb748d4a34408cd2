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


def read_image(path: str | Path) -> Image.Image:
    """The picture in a PNG, JPEG or WebP file (by content, whatever its name) as RGB, upright, without its metadata.

    Transparent pixels are laid on white; 16-bit grey is scaled to 8 bits. Refused with InputError: what is not a
    regular file, more than 64 MP (by the header, before decoding), animations, truncated and broken files.
    """
    with _opened(Path(path)) as image:
        rgb = _rgb(ImageOps.exif_transpose(image))
        return Image.frombytes("RGB", rgb.size, rgb.tobytes())  # a fresh image carries no `info`


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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
