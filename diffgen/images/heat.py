"""Draw a map of numbers over a picture, in colours: the attention of a word."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .strip import BACK, GAP, INK, LINE, font, wrapped

# From the least to the greatest value, lighter and lighter.
COLOURS = np.array([(12, 8, 60), (96, 20, 122), (196, 52, 84), (244, 136, 32), (255, 240, 140)], float)
LEAST = 256  # pixels: smaller pictures are enlarged by a whole factor
OPACITY = 0.65  # the same everywhere, so that colours are those of the scale


def overlay(picture: Image.Image, heat: np.ndarray, word: str) -> Image.Image:
    """The picture in grey under the map [h, w], from its least to its greatest value; the word above, a scale below.

    The scale is the part of the attention, in hundredths, that the word got at the least and the most attended place.
    """
    factor = -(-LEAST // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    low, high = float(heat.min()), float(heat.max())
    level = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    large = np.asarray(Image.fromarray(level.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.NEAREST), float)[..., None]
    mixed = (1 - OPACITY) * grey + OPACITY * coloured(large)
    title = wrapped(word, size[0] - 2 * GAP)
    top = len(title) * LINE + 4
    paper = Image.new("RGB", (size[0], top + size[1] + LINE + 4), BACK)
    paper.paste(Image.fromarray(np.rint(mixed).astype(np.uint8)), (0, top))
    draw = ImageDraw.Draw(paper)
    draw.multiline_text((GAP, 1), "\n".join(title), INK, font(), spacing=LINE - 12)
    ends = [f"{100 * low:.2g} %", f"{100 * high:.2g} %"]
    left, right = GAP * 2 + round(font().getlength(ends[0])), size[0] - GAP * 2 - round(font().getlength(ends[1]))
    y = top + size[1] + 2
    draw.text((GAP, y), ends[0], INK, font())
    draw.text((right + GAP, y), ends[1], INK, font())
    scale = np.tile(np.linspace(0, 1, max(1, right - left)), (LINE - 4, 1))
    paper.paste(Image.fromarray(np.rint(coloured(scale)).astype(np.uint8)), (left, y + 2))
    return paper


def coloured(level: np.ndarray) -> np.ndarray:
    """Colours [..., 3] from 0 to 255 of levels from 0 to 1, linear between those of the table."""
    places = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(level, places, COLOURS[:, c]) for c in range(3)], -1)
