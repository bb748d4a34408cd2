"""The picture of an evaluation: samples above their nearest training pictures, with the distances."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffgen.images.pixels import to_pil

from .real_pictures import RealPictures

SIDE = 72  # pixels; smaller pictures are enlarged by a whole factor, larger ones reduced
GAP, LINE = 6, 16
COLUMNS, ROWS = 8, 4
PAPER, INK = "white", "black"


def neighbours(real: RealPictures, samples: Tensor) -> Image.Image:
    """Draw up to 32 of the samples uint8 [N, C, H, W] above their nearest training pictures, nearest pairs first."""
    distance, number = real.nearest(samples)
    order = distance.argsort(stable=True)
    shown = order[torch.linspace(0, len(order) - 1, min(len(order), COLUMNS * ROWS)).round().long()]
    above = to_pil(real.data.to_float(samples[shown]).numpy(), real.data.levels)
    below = to_pil(real.data.to_float(real.train[number[shown]]).numpy(), real.data.levels)
    above, below = [_sized(picture) for picture in above], [_sized(picture) for picture in below]
    width, height = above[0].size
    across, down = max(width, 32) + GAP, 2 * height + LINE + GAP + 6
    columns = min(COLUMNS, len(shown))
    text = "above: samples; below: the nearest training picture; distance 1: the median of held-out pictures"
    font = ImageFont.load_default(11)
    lines = _wrapped(text, columns * across - GAP, font)
    top = GAP + LINE * len(lines)
    sheet = Image.new("RGB", (columns * across + GAP, top + -(-len(shown) // columns) * down), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((GAP, GAP // 2 + LINE * i), line, INK, font)
    for i, (sample, real_one) in enumerate(zip(above, below, strict=True)):
        x, y = GAP + i % columns * across, top + i // columns * down
        for picture, at in ((sample, y), (real_one, y + height + 3)):
            sheet.paste(picture, (x, at), picture if picture.mode == "RGBA" else None)
        draw.text((x, y + 2 * height + 4), f"{distance[shown[i]]:.3g}", INK, font)
    return sheet


def _sized(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest <= SIDE:
        factor = max(1, round(SIDE / longest))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, picture.width * SIDE // longest), max(1, picture.height * SIDE // longest))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
