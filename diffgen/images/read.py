"""Read pictures. A file's header is checked before the file may cost memory."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from diffgen.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 8192 * 8192  # 64 MP
MAX_READ_SIDE = 2**15
MAX_BYTES = 512 * 2**20  # of the file

MAX_TEXT = 4 * 2**20  # characters of one text that a picture carries

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK_HEAD, CHUNK_SUM = 8, 4  # bytes: size and kind before a chunk's data, the check sum behind it
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
MAX_CHUNK = 8 * 2**20  # bytes of a chunk that holds no pixels
MAX_CHUNKS = 100_000

ORIENTATION = 0x0112  # EXIF; from 5 on the stored picture lies on its side
EXIF_FOLDER, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
DESCRIPTION, MAKE, MODEL, SOFTWARE = 0x010E, 0x010F, 0x0110, 0x0131


Source = str | Path | bytes  # a file's path, or its contents


def read_image(path: Source, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a PNG, JPEG or WebP file (by content, whatever its name), upright, without its metadata.

    `mode` is RGB, L (grey) or RGBA. Without an alpha channel, transparent pixels are laid on white; 16-bit grey is
    scaled to 8 bits. Refused with InputError: what is not a regular file, more than `max_pixels` (by the header, before
    decoding), animations, truncated and broken files.
    """
    with _opened(path, max_pixels) as image:
        converted = _converted(ImageOps.exif_transpose(image), mode)
        return Image.frombytes(mode, converted.size, converted.tobytes())  # a fresh image carries no `info`


def read_kind(path: Source) -> tuple[int, int, str]:
    """(width, height, mode) of a picture by its header: upright; L, RGB, or RGBA if any pixel may be transparent.

    The same checks as `read_image`, except that the pixels are not decoded.
    """
    with _opened(path) as image:
        size = image.size[::-1] if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else image.size
        grey = image.mode in ("1", "L") or image.mode.startswith("I")
        return *size, "RGBA" if image.has_transparency_data else "L" if grey else "RGB"


@dataclass(frozen=True)
class Carried:
    """The texts that a picture file carries beside its pixels."""

    texts: dict[str, str] = field(default_factory=dict)  # PNG text chunks by keyword
    comment: str = ""  # EXIF's UserComment
    tags: dict[int, str] = field(default_factory=dict)  # EXIF's description, make, model, software, maker note
    xmp: str = ""
    width: int = 0
    height: int = 0


def read_carried(path: Source) -> Carried:
    """The texts in PNG chunks, EXIF and XMP. Checks as `read_image` does; a text over MAX_TEXT is refused."""
    texts = read_texts(path)
    with _opened(path) as image:
        exif = image.getexif()
        inner = exif.get_ifd(EXIF_FOLDER)
        width, height = image.size[::-1] if exif.get(ORIENTATION, 1) in (5, 6, 7, 8) else image.size
        raw_tags = {tag: inner.get(tag, exif.get(tag)) for tag in (USER_COMMENT, MAKER_NOTE)}
        raw_tags |= {tag: exif.get(tag) for tag in (DESCRIPTION, MAKE, MODEL, SOFTWARE)}
        tags = {tag: exif_text(value) for tag, value in raw_tags.items() if isinstance(value, str | bytes)}
        xmp = image.info.get("xmp", b"")
        xmp = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else ""
        longest = max(map(len, (*texts.values(), *tags.values(), xmp)), default=0)
        if longest > MAX_TEXT:
            raise InputError(f"{_name(path)} carries a text of {longest} characters; at most {MAX_TEXT} are read")
        return Carried(texts, tags.pop(USER_COMMENT, ""), tags, xmp, width, height)


def exif_text(value: str | bytes) -> str:
    """The text in an EXIF value, which may begin with eight bytes that say how it is encoded (EXIF 2.3, 4.6.5)."""
    if isinstance(value, str):
        return value.rstrip("\0")
    code, body = value[:8], value[8:]
    if code == b"UNICODE\0":
        zeros = [body[start:2000:2].count(0) for start in (0, 1)]  # most texts have Latin letters in them
        return body.decode("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", "replace").strip("\ufeff\0")
    if code not in (b"ASCII\0\0\0", bytes(8)):
        body = value
    return body.decode("utf-8", "replace").rstrip("\0")


def read_texts(path: Source) -> dict[str, str]:
    """The texts that a picture carries beside its pixels, by keyword (PNG text chunks).

    The same checks as `read_image`, except that the pixels are not decoded.
    """
    with _opened(path) as image:
        if isinstance(image, PngImageFile):
            _read_late_texts(image)
        return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}


def _read_late_texts(image: PngImageFile) -> None:
    """Read the texts that follow the pixels of a PNG file, which are skipped, into its `info`."""
    chunks, file = image.png, image.fp
    assert chunks is not None
    assert file is not None
    file.seek(image.tile[0].offset - CHUNK_HEAD)
    while (chunk := chunks.read())[0] != b"IEND":
        kind, _, size = chunk
        if kind in TEXT_CHUNKS:
            chunks.call(*chunk)
        else:
            file.seek(size, os.SEEK_CUR)
        file.seek(CHUNK_SUM, os.SEEK_CUR)


def _check_chunks(file: BinaryIO, name: str) -> None:
    """Raise InputError for a PNG file with very many chunks, or one beside the pixels that would cost much memory."""
    if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE:
        for _ in range(MAX_CHUNKS):
            head = file.read(CHUNK_HEAD)
            size, kind = int.from_bytes(head[:4]), head[4:]
            if len(head) < CHUNK_HEAD or kind == b"IEND":
                break
            if kind != b"IDAT" and size > MAX_CHUNK:
                raise InputError(f"cannot read {name}: it carries {size} bytes of {kind!r}, at most {MAX_CHUNK}")
            file.seek(size + CHUNK_SUM, os.SEEK_CUR)
        else:
            raise InputError(f"cannot read {name}: it has more than {MAX_CHUNKS} chunks")
    file.seek(0)


@contextlib.contextmanager
def _opened(source: Source, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The opened, not yet decoded picture; every refusal, also one while decoding, becomes InputError."""
    hint = "give a PNG, JPEG or WebP picture"
    name = _name(source)
    with _file(source, hint) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures (our limit is lower) and of broken metadata
        try:
            _check_chunks(file, name)
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels or max(width, height) > MAX_READ_SIDE:
                most = f"{max_pixels / 2**20:.3g} MP"
                raise InputError(
                    f"{name} is too large: {width}x{height} pixels, at most {most}", "make it smaller first"
                )
            # A JPEG with several pictures (format MPO) is a photo with previews or a depth map: its first is the photo.
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":
                raise InputError(f"{name} is an animation of {frames} frames", hint)
            yield image
        except (InputError, MemoryError):
            raise
        except Exception as error:  # a decoder may raise anything on hostile bytes
            raise InputError(f"cannot read {name}: {_reason(error)}", hint) from error


def _name(source: Source) -> str:
    return "the picture" if isinstance(source, bytes) else f"the picture {source}"


def _file(source: Source, hint: str) -> BinaryIO:
    """The bytes as a file, or the file at a path. Raises InputError."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    name = _name(source)
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {name}: {reason}", hint) from error
    status = os.fstat(descriptor)
    problem = "not a regular file" if not stat.S_ISREG(status.st_mode) else ""
    if not problem and status.st_size > MAX_BYTES:
        problem = f"it has {status.st_size} bytes, at most {MAX_BYTES}"
    if problem:
        os.close(descriptor)
        raise InputError(f"cannot read {name}: {problem}", hint)
    return open(descriptor, "rb")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no PNG, JPEG or WebP file, or its header is broken"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has far more than {MAX_PIXELS // 2**20} MP"
    return f"it is truncated or broken ({error})"


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        import numpy as np

        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert(mode)
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)
