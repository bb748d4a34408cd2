"""Draw the places that things can be in: snow, grass, sea, night, desert, sky, room.

    picture, ground = background("snow", np.random.default_rng(0))

A place is drawn by a few polygons at twice its size and reduced, in colours that differ a little from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
_LARGE = 2 * SIDE

Rng = np.random.Generator
Colour = tuple[int, int, int]


def _shade(rng: Rng, colour: str, by: float = 8) -> Colour:
    """A colour ("#rrggbb"), a little lighter or darker and a little off its hue."""
    value = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) + rng.uniform(-by, by) + rng.uniform(-3, 3, 3)
    r, g, b = value.clip(0, 255).round().astype(int).tolist()
    return r, g, b


def _gradient(top: Colour, bottom: Colour, height: int = _LARGE) -> Image.Image:
    """A square whose first `height` rows go from one colour to the other; the rest has the second."""
    part = (np.arange(_LARGE) / height).clip(0, 1)[:, None]
    rows = np.array(top) * (1 - part) + np.array(bottom) * part
    column = Image.fromarray(rows.round().astype(np.uint8)[:, None])
    return column.resize((_LARGE, _LARGE), Image.Resampling.NEAREST)


def _hill(rng: Rng, draw: ImageDraw.ImageDraw, level: float, height: float, colour: Colour, waves: float = 1.0) -> None:
    """All below a wavy line, `level` and `height` in pixels of the finished picture."""
    x = np.linspace(0, _LARGE, 33)
    phase, second = rng.uniform(0, 2 * np.pi, 2)
    turns = waves * rng.uniform(0.7, 1.3)
    line = np.sin(turns * x / _LARGE * 2 * np.pi + phase) + 0.4 * np.sin(2.3 * turns * x / _LARGE * 2 * np.pi + second)
    y = 2 * (level - height * line / 1.4)
    draw.polygon([*zip(x.tolist(), y.tolist(), strict=True), (_LARGE, _LARGE), (0, _LARGE)], colour)


def _disk(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse((2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)), colour)


def _cloud(rng: Rng, draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: Colour) -> None:
    """Three to five disks on a flat base."""
    for k in np.linspace(-1, 1, int(rng.integers(3, 6))):
        radius = size * (0.55 - 0.25 * abs(k)) * rng.uniform(0.85, 1.15)
        _disk(draw, x + k * size, y - radius * 0.45, radius, colour)
    draw.rounded_rectangle(
        (2 * (x - 1.35 * size), 2 * y, 2 * (x + 1.35 * size), 2 * (y + 0.3 * size)), size * 0.3, colour
    )


def _fir(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colours: Sequence[Colour]) -> None:
    """Three triangles upon a trunk that ends at y."""
    draw.rectangle((2 * x - size * 0.12, 2 * y - size * 0.4, 2 * x + size * 0.12, 2 * y), colours[0])
    for k in range(3):
        top, width = y - size * (1.0 - 0.22 * k), size * (0.2 + 0.1 * k)
        points = [(x, top), (x - width, top + size * 0.4), (x + width, top + size * 0.4)]
        draw.polygon([(2 * a, 2 * b) for a, b in points], colours[1])


def _snow(rng: Rng) -> tuple[Image.Image, float]:
    picture = _gradient(_shade(rng, "#9cc4e6"), _shade(rng, "#dcebf7"), 2 * 76)
    draw = ImageDraw.Draw(picture)
    _hill(rng, draw, 74, 7, _shade(rng, "#c9deef", 5))
    for x in rng.uniform(4, 124, int(rng.integers(2, 5))):
        _fir(draw, x, rng.uniform(77, 83), rng.uniform(16, 26), (_shade(rng, "#6b4a36"), _shade(rng, "#4d8577")))
    _hill(rng, draw, 86, 5, _shade(rng, "#eaf3fa", 4))
    _hill(rng, draw, 106, 4, (249, 252, 255))
    for x, y in rng.uniform(2, 126, (int(rng.integers(12, 20)), 2)):
        _disk(draw, x, y, rng.uniform(0.8, 1.7), (255, 255, 255))
    return picture, 110


def _grass(rng: Rng) -> tuple[Image.Image, float]:
    picture = _gradient(_shade(rng, "#7cc3f2"), _shade(rng, "#d3eefb"), 2 * 80)
    draw = ImageDraw.Draw(picture)
    _cloud(rng, draw, rng.uniform(16, 50), rng.uniform(16, 30), rng.uniform(8, 13), (255, 255, 255))
    _cloud(rng, draw, rng.uniform(80, 112), rng.uniform(12, 34), rng.uniform(7, 12), (255, 255, 255))
    _hill(rng, draw, 74, 8, _shade(rng, "#93cf7c"))
    _hill(rng, draw, 88, 5, _shade(rng, "#77bf5c"))
    _hill(rng, draw, 107, 3, _shade(rng, "#62ad49"))
    blade = _shade(rng, "#4f9a3c")
    for x, y in zip(rng.uniform(0, 128, 16), rng.uniform(96, 127, 16), strict=True):
        draw.line((2 * x, 2 * y, 2 * x + rng.uniform(-3, 3), 2 * y - rng.uniform(5, 10)), blade, 2)
    for x, y in zip(rng.uniform(3, 125, 7), rng.uniform(98, 125, 7), strict=True):
        _disk(draw, x, y, 1.9, _shade(rng, str(rng.choice(["#ffffff", "#ffe066", "#ff9ec4"]))))
        _disk(draw, x, y, 0.8, (250, 190, 60))
    return picture, 110


def _sea(rng: Rng) -> tuple[Image.Image, float]:
    picture = _gradient(_shade(rng, "#8fd0f5"), _shade(rng, "#e4f5fc"), 2 * 66)
    draw = ImageDraw.Draw(picture)
    _cloud(rng, draw, rng.uniform(20, 108), rng.uniform(14, 32), rng.uniform(8, 14), (255, 255, 255))
    for level, colour in ((66, "#4fb0dd"), (82, "#3a9bd0"), (98, "#2b86c0"), (114, "#2274ad")):
        _hill(rng, draw, level, 2.2, _shade(rng, colour, 5), 3.0)
    foam = _shade(rng, "#b9e3f5")
    for x, y in zip(rng.uniform(2, 118, 13), rng.uniform(74, 124, 13), strict=True):
        width = rng.uniform(5, 11)
        draw.arc((2 * x, 2 * y, 2 * (x + width), 2 * y + width * 0.9), 200, 340, foam, 3)
    return picture, 106


def _night(rng: Rng) -> tuple[Image.Image, float]:
    picture = _gradient(_shade(rng, "#10173f", 5), _shade(rng, "#3c4a8c", 6), 2 * 92)
    draw = ImageDraw.Draw(picture)
    for x, y in zip(rng.uniform(1, 127, 22), rng.uniform(1, 82, 22), strict=True):
        _disk(draw, x, y, rng.uniform(0.5, 1.2), _shade(rng, "#f6f0d4", 12))
    x, y, radius = rng.choice([rng.uniform(12, 30), rng.uniform(98, 116)]), rng.uniform(14, 28), rng.uniform(8, 11)
    _disk(draw, x, y, radius, _shade(rng, "#f8ecb8", 5))
    for k, size in ((-0.35, 0.22), (0.3, 0.16), (0.05, 0.13)):
        _disk(draw, x + k * radius, y + rng.uniform(-0.4, 0.4) * radius, size * radius, _shade(rng, "#e3d392", 4))
    _hill(rng, draw, 88, 7, _shade(rng, "#232f66", 4))
    _hill(rng, draw, 104, 4, _shade(rng, "#18214d", 4))
    return picture, 110


def _desert(rng: Rng) -> tuple[Image.Image, float]:
    picture = _gradient(_shade(rng, "#f7b267"), _shade(rng, "#fde6b8"), 2 * 78)
    draw = ImageDraw.Draw(picture)
    _disk(
        draw,
        rng.choice([rng.uniform(16, 34), rng.uniform(94, 112)]),
        rng.uniform(20, 36),
        rng.uniform(9, 13),
        _shade(rng, "#fff3c9", 4),
    )
    _hill(rng, draw, 76, 8, _shade(rng, "#e3ab66"))
    _hill(rng, draw, 90, 7, _shade(rng, "#eec184"))
    _hill(rng, draw, 107, 4, _shade(rng, "#f3cf96"))
    ripple = _shade(rng, "#e0b374")
    for x, y in zip(rng.uniform(2, 112, 9), rng.uniform(98, 124, 9), strict=True):
        width = rng.uniform(8, 16)
        draw.arc((2 * x, 2 * y, 2 * (x + width), 2 * y + width * 0.5), 190, 350, ripple, 2)
    return picture, 110


def _sky(rng: Rng) -> tuple[Image.Image, float]:
    picture = _gradient(_shade(rng, "#4fa4ea"), _shade(rng, "#c4e6fb"))
    draw = ImageDraw.Draw(picture)
    corners = ((8, 40, 12, 30), (88, 120, 14, 40), (10, 44, 92, 116), (84, 118, 90, 118))
    for left, right, top, bottom in corners:
        x, y = rng.uniform(left, right), rng.uniform(top, bottom)
        _cloud(rng, draw, x, y, rng.uniform(8, 15), _shade(rng, "#fafdff", 4))
    return picture, 98


def _room(rng: Rng) -> tuple[Image.Image, float]:
    wall = _shade(rng, str(rng.choice(["#f3dfc6", "#dfe7da", "#e9d9e2", "#d9e3ee"])), 4)
    picture = Image.new("RGB", (_LARGE, _LARGE), wall)
    draw = ImageDraw.Draw(picture)
    floor, line = _shade(rng, "#c08a5a"), _shade(rng, "#a87448", 4)
    draw.rectangle((0, 2 * 90, _LARGE, _LARGE), floor)
    for y in (100, 112, 124):
        draw.line((0, 2 * y, _LARGE, 2 * y), line, 2)
    draw.rectangle((0, 2 * 86, _LARGE, 2 * 90), (250, 247, 240))
    left = float(rng.choice([rng.uniform(8, 18), rng.uniform(78, 88)]))
    frame, glass = (255, 255, 255), _shade(rng, "#a9dbf6")
    draw.rectangle((2 * left, 2 * 14, 2 * (left + 32), 2 * 54), frame)
    for x in (left + 3, left + 17.5):
        for y in (17, 35.5):
            draw.rectangle((2 * x, 2 * y, 2 * (x + 11.5), 2 * (y + 15.5)), glass)
    other = 104 - left
    draw.rectangle((2 * (other - 10), 2 * 22, 2 * (other + 12), 2 * 44), _shade(rng, "#8c5f3d"))
    draw.rectangle(
        (2 * (other - 7.5), 2 * 24.5, 2 * (other + 9.5), 2 * 41.5),
        _shade(rng, str(rng.choice(["#f2c14e", "#7fb7a3", "#d98d8d"]))),
    )
    rug = _shade(rng, str(rng.choice(["#b5524c", "#4d7ea8", "#7a9e7e"])))
    draw.ellipse((2 * 16, 2 * 99, 2 * 112, 2 * 123), rug)
    draw.ellipse((2 * 22, 2 * 101.5, 2 * 106, 2 * 120.5), tuple(min(255, c + 24) for c in rug))
    return picture, 112


PLACES: dict[str, Callable[[Rng], tuple[Image.Image, float]]] = {
    "snow": _snow,
    "grass": _grass,
    "sea": _sea,
    "night": _night,
    "desert": _desert,
    "sky": _sky,
    "room": _room,
}


def background(place: str, rng: Rng) -> tuple[Image.Image, float]:
    """(RGB picture of SIDE × SIDE, the row that things stand on) of a place."""
    picture, ground = PLACES[place](rng)
    return picture.reduce(2), ground
