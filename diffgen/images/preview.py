"""A picture in a terminal: half-blocks, two pixels a character, one in its colour, one behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from PIL import Image

from .sheet import PAPER, SMALLEST

if TYPE_CHECKING:
    import numpy as np

BLOCK = "▀"
RESET = "\x1b[0m"
CUBE = (0, 95, 135, 175, 215, 255)  # levels of xterm's colours 16 to 231; 232 to 255 are the greys 8, 18, …


def colours_of(environ: Mapping[str, str], terminal: bool, encoding: str | None) -> str | None:
    """The colours that a stream shows, "24bit" or "256"; None if it is no terminal for pictures.

    That is no terminal, a dumb one, one whose encoding has no half-block, or anywhere where NO_COLOR is set.
    """
    if not terminal or environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return None
    try:
        BLOCK.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return None
    return "24bit" if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") else "256"


def half_blocks(image: Image.Image, columns: int, rows: int, colours: str = "24bit") -> list[str]:
    """The picture in at most `rows` lines of at most `columns` characters, with escape codes; each line ends plain.

    It keeps its proportions. Small ones are enlarged by a whole factor if there is room; RGBA lies on grey.
    """
    import numpy as np

    pixels = np.asarray(_scaled(image, columns, rows))
    if colours == "256":
        codes = [[f"5;{number}" for number in row] for row in _nearest(pixels).tolist()]
    else:
        codes = [[f"2;{r};{g};{b}" for r, g, b in row] for row in pixels.tolist()]
    lines = []
    for y in range(0, len(codes), 2):
        below = [f"48;{code}" for code in codes[y + 1]] if y + 1 < len(codes) else ["49"] * len(codes[y])
        line, last = "", ""
        for upper, lower in zip(codes[y], below, strict=True):
            code = f"\x1b[38;{upper};{lower}m"
            line += (code if code != last else "") + BLOCK
            last = code
        lines.append(line + RESET)
    return lines


def _scaled(image: Image.Image, columns: int, rows: int) -> Image.Image:
    if image.mode == "RGBA":
        paper = Image.new("RGBA", image.size, (PAPER, PAPER, PAPER, 255))
        image = Image.alpha_composite(paper, image)
    image = image.convert("RGB")
    scale = min(columns / image.width, 2 * rows / image.height)
    if scale >= 1:
        factor = min(int(scale), -(-SMALLEST // max(image.size)))
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _nearest(pixels: np.ndarray) -> np.ndarray:
    """For each pixel [H, W, 3] the nearest of xterm's colours 16 to 255."""
    import numpy as np

    levels = np.array(CUBE)
    values = pixels.astype(int)
    steps = np.abs(values[..., None] - levels).argmin(-1)
    cube = 16 + steps @ np.array([36, 6, 1])
    grey = np.clip(np.rint((values.mean(-1) - 8) / 10), 0, 23).astype(int)
    far_cube = ((values - levels[steps]) ** 2).sum(-1)
    far_grey = ((values - (8 + 10 * grey)[..., None]) ** 2).sum(-1)
    return np.where(far_grey < far_cube, 232 + grey, cube)
