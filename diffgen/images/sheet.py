"""Many small pictures on one sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PAPER = 128  # grey, so that white and black pictures have edges
SMALLEST = 32  # pixels: smaller pictures are enlarged by a whole factor
LABELLED = 64  # the same for pictures with labels
LINE, GAP = 16, 4  # pixels of a line of text, and between pictures


def sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """The rows of pictures, all of one size, below each other; RGBA lies on the paper, small pictures are enlarged.

    Raises ValueError if there is no picture.
    """
    if not rows or not rows[0]:
        raise ValueError("a sheet needs at least one picture")
    width, height, factor = _enlarged(rows[0][0], SMALLEST)
    columns = max(len(row) for row in rows)
    size = (columns * (width + gap) + gap, len(rows) * (height + gap) + gap)
    grey = all(picture.mode == "L" for row in rows for picture in row)
    paper = Image.new("L" if grey else "RGB", size, PAPER if grey else (PAPER,) * 3)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            _paste(paper, picture, factor, (gap + x * (width + gap), gap + y * (height + gap)))
    return paper


def labelled_sheet(
    title: str, groups: Mapping[str, Sequence[Image.Image]], names: Sequence[str] = (), columns: int = 8
) -> Image.Image:
    """Groups of pictures, all of one size, each below its heading; `names` has the label of each picture of a group.

    The title is in the first line. Small pictures are enlarged by a whole factor. Raises ValueError if there is no
    picture.
    """
    first = next((pictures[0] for pictures in groups.values() if pictures), None)
    if first is None:
        raise ValueError("a sheet needs at least one picture")
    width, height, factor = _enlarged(first, LABELLED)
    columns = min(columns, max(map(len, groups.values())))
    label = LINE if names else 0
    rows = {heading: -(-len(pictures) // columns) for heading, pictures in groups.items()}
    tall = LINE + GAP + sum(LINE + GAP + count * (height + label + GAP) for count in rows.values())
    font = ImageFont.load_default(12)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    widest = max(measure.textlength(text, font) for text in (title, *groups))
    paper = Image.new("RGB", (max(columns * (width + GAP), int(widest) + GAP) + GAP, tall + GAP), (PAPER,) * 3)
    draw = ImageDraw.Draw(paper)
    draw.text((GAP, GAP), title, "white", font)
    top = GAP + LINE + GAP
    for heading, pictures in groups.items():
        draw.text((GAP, top), heading, "white", font)
        top += LINE + GAP
        for i, picture in enumerate(pictures):
            row, column = divmod(i, columns)
            x, y = GAP + column * (width + GAP), top + row * (height + label + GAP)
            if names:
                draw.text((x, y), fit_text(draw, names[i], font, width), "white", font)
            _paste(paper, picture, factor, (x, y + label))
        top += rows[heading] * (height + label + GAP)
    return paper


def fit_text(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    """The text in one line, cut with an ellipsis if it is wider than so many pixels.

    Characters that the font has not are left out: Pillow's own font has no Chinese ones.
    """
    text = " ".join("".join(c for c in text if has_glyph(font, c)).split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def has_glyph(font: Any, character: str) -> bool:
    """Whether the font can draw a character, rather than the box for missing ones."""
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))


def _enlarged(picture: Image.Image, smallest: int) -> tuple[int, int, int]:
    """(width, height, factor): the size at which pictures of this size are shown."""
    width, height = picture.size
    factor = -(-smallest // max(width, height))
    return width * factor, height * factor, factor


def _paste(paper: Image.Image, picture: Image.Image, factor: int, corner: tuple[int, int]) -> None:
    large = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    paper.paste(large, corner, large if large.mode == "RGBA" else None)
