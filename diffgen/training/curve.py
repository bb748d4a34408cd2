"""curve.png of a run: its losses by step, from metrics.jsonl.

It is drawn with Pillow: importing matplotlib takes as long as a short training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 500
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 50
LINES = {  # the key in metrics.jsonl: (label, colour)
    "loss": ("training", "#4c78a8"),
    "held_out_raw": ("held out", "#f58518"),
    "held_out_ema": ("held out, average of the weights", "#2f8f4e"),
}
INK, PALE = "#333333", "#dddddd"
MOST = 2000  # points of a line; of more, each point is the mean of several

Points = list[tuple[float, float]]


def curve(metrics: Iterable[bytes], segments: Sequence[int] = ()) -> Image.Image | None:
    """Draw the losses in the lines of metrics.jsonl, on a logarithmic scale; None if there are none above 0.

    A vertical line marks the end of each of the `segments`.
    """
    lines = {key: thinned(points) for key, points in points_of(metrics).items() if points}
    if not lines:
        return None
    losses = [loss for points in lines.values() for _, loss in points]
    low, high = math.log10(min(losses)), math.log10(max(losses))
    margin = max(0.05, 0.08 * (high - low))
    low, high = low - margin, high + margin
    last = max(points[-1][0] for points in lines.values())

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + step / last * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - math.log10(loss)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    draw.text((LEFT, 14), "loss", INK, font)
    for loss in ticks(10**low, 10**high):
        _, y = place(0, loss)
        draw.line((LEFT, y, WIDTH - RIGHT, y), PALE)
        draw.text((LEFT - 8, y), f"{loss:g}", INK, font, anchor="rm")
    for step in steps_of(last):
        x, _ = place(step, 10**low)
        draw.line((x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5), INK)
        draw.text((x, HEIGHT - BOTTOM + 8), f"{step:,}", INK, font, anchor="mt")
    for end in segments:
        if end < last:
            x, _ = place(end, 10**low)
            draw.line((x, TOP, x, HEIGHT - BOTTOM), "#999999")
            draw.text((x + 4, TOP), f"continued at {end:,}", "#777777", font)
    draw.line((LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM), INK)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8), "step", INK, font, anchor="mb")
    right = float(WIDTH - RIGHT)
    for key, points in reversed(lines.items()):
        label, colour = LINES[key]
        places = [place(*point) for point in points]
        draw.line(places, colour, 2, joint="curve")
        if len(points) <= 60:
            for x, y in places:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        right -= draw.textlength(label, font)
        draw.text((right, 14), label, colour, font)
        right -= 24
    return picture


def points_of(metrics: Iterable[bytes]) -> dict[str, Points]:
    """(step, loss) by key of LINES. Lines that are not JSON objects, and losses that no logarithm has, are left out."""
    points: dict[str, Points] = {key: [] for key in LINES}
    for line in metrics:
        try:
            values = json.loads(line)
            step = values["step"]
            for key in LINES:
                if key in values and 0 < values[key] < math.inf and step > 0:
                    points[key].append((step, values[key]))
        except (ValueError, TypeError, KeyError):
            continue
    return points


def thinned(points: Points) -> Points:
    """At most MOST points: the means of groups of equal length."""
    size = -(-len(points) // MOST)
    if size == 1:
        return points
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, about logarithmic: 1, 2 and 5 times powers of ten, or even steps in less."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    inside = [number for number in numbers if low <= number <= high]
    if len(inside) >= 3:
        return inside
    step = _round((high - low) / 4)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def steps_of(last: float) -> list[int]:
    """Up to eight round steps from 0 to the last one."""
    by = max(1, round(_round(last / 6)))
    return list(range(0, int(last) + 1, by))


def _round(x: float) -> float:
    """The number of the form 1, 2 or 5 times a power of ten that is nearest above x."""
    power = 10.0 ** math.floor(math.log10(x))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= x * 0.999)
