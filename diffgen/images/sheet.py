"""Many small pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

PAPER = 128  # grey, so that white and black pictures have edges
SMALLEST = 32  # pixels: smaller pictures are enlarged by a whole factor


def sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """The rows of pictures, all of one size, below each other; RGBA lies on the paper, small pictures are enlarged.

    Raises ValueError if there is no picture.
    """
    if not rows or not rows[0]:
        raise ValueError("a sheet needs at least one picture")
    width, height = rows[0][0].size
    factor = -(-SMALLEST // max(width, height))
    width, height = width * factor, height * factor
    columns = max(len(row) for row in rows)
    size = (columns * (width + gap) + gap, len(rows) * (height + gap) + gap)
    grey = all(picture.mode == "L" for row in rows for picture in row)
    paper = Image.new("L" if grey else "RGB", size, PAPER if grey else (PAPER,) * 3)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            large = picture.resize((width, height), Image.Resampling.NEAREST)
            corner = (gap + x * (width + gap), gap + y * (height + gap))
            paper.paste(large, corner, large if large.mode == "RGBA" else None)
    return paper
