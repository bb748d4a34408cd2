"""Pictures brought to a size: scaled and cropped, grown at the edges, laid over one another. Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from diffgen.errors import UsageError


def cover(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The picture at exactly (width, height): scaled, keeping its proportions, until it covers that, then cropped
    evenly at both sides. A picture that has the size already is returned as it is."""
    if image.size == size:
        return image
    width, height = size
    scale = max(width / image.width, height / image.height)
    # what is cut off, in pixels of the picture; where that is nothing, rounding may give a little less
    left, top = max(0.0, (image.width - width / scale) / 2), max(0.0, (image.height - height / scale) / 2)
    return image.resize(size, resample, box=(left, top, image.width - left, image.height - top))


def parse_margins(margins: str | Sequence[int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels from "L,T,R,B", one number for all, or the numbers. Raises UsageError."""
    if isinstance(margins, str):
        parts = [part.strip() for part in margins.split(",")]
        widths = [int(part) if part.isascii() and part.isdigit() and len(part) < 6 else -1 for part in parts]
    else:
        widths = list(margins)
    if len(widths) == 1:
        widths *= 4
    if len(widths) != 4 or any(type(n) is not int or not 0 <= n <= 8192 for n in widths) or not any(widths):
        raise UsageError(
            f"--outpaint must be LEFT,TOP,RIGHT,BOTTOM in pixels, or one number for all (got {margins!r})",
            "for example --outpaint 0,0,64,0",
        )
    left, top, right, bottom = widths
    return left, top, right, bottom


def grow(image: Image.Image, margins: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
    """(canvas, mask): the picture with margins (left, top, right, bottom) that repeat its edge pixels; white in the
    mask is what was added."""
    import numpy as np

    left, top, right, bottom = margins
    canvas = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.pad(np.zeros((image.height, image.width), np.uint8), ((top, bottom), (left, right)), constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def compose(made: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """`made` where the mask (L) is white, exactly `original` where it is black, in between a mixture by its grey."""
    return Image.composite(made, original, mask)
