"""Pixels and numbers: the one place that knows that the networks' [-1, 1] is the picture's 0 … 255."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from PIL import Image

from diffgen.errors import InvalidOutput

if TYPE_CHECKING:
    import numpy as np

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels


def to_pil(x: np.ndarray, levels: int = 256) -> list[Image.Image]:
    """Pictures from floats [B, C, H, W] in [-1, 1]: (x + 1)·127.5, clipped to 0 … 255, rounded to the nearest.

    C is 1 (grey), 3 (RGB) or 4 (RGBA). Data of fewer `levels`, evenly from −1 to 1, is rounded to these first. A half
    goes to the even neighbour: with 256 levels these are the very bits that diffusers' image processor computes.
    Raises InvalidOutput if a value is not finite.
    """
    import numpy as np

    if x.ndim != 4 or x.shape[1] not in MODES:
        raise ValueError(f"expected floats [B, 1, 3 or 4, H, W], got {list(x.shape)}")
    if not np.isfinite(x).all():
        bad = [i for i, picture in enumerate(x) if not np.isfinite(picture).all()]
        raise InvalidOutput(
            f"the model's output is not finite in picture {', '.join(str(i + 1) for i in bad)} of {len(x)}",
            "try --dtype float32",
        )
    scaled = (x.astype(np.float32) + np.float32(1)) * np.float32((levels - 1) / 2)
    values = np.rint(scaled.clip(0, levels - 1))
    if levels != 256:
        values = np.rint(values * np.float32(255 / (levels - 1)))
    pixels = values.astype(np.uint8).transpose(0, 2, 3, 1)
    if pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]


def from_pil(image: Image.Image) -> np.ndarray:
    """Floats [3, H, W] in [-1, 1], float32; `to_pil` gives exactly the same pixels back."""
    import numpy as np

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1)


def pixels_sha256(image: Image.Image) -> str:
    """SHA-256 (hex) of the RGB bytes, row by row: the same picture, whatever file it lies in."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
