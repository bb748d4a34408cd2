"""Draw the plots of the page as SVG text: axes, curves with intervals, ticks on a line, markers.

A style is a number: it selects a colour (c0 … c7, defined in the page's style sheet), a shape and, from the ninth on, a
dashed line with hollow shapes, so that nothing depends on the colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 720, 370
LEFT, RIGHT, TOP, BOTTOM = 66, 246, 14, 50  # RIGHT has room for the names of the curves
NAME = 32  # characters of a name that RIGHT has room for
LINE = 15  # the least distance between two names
COLOURS = 8
SHAPES = (
    "M-4.4 0a4.4 4.4 0 1 0 8.8 0a4.4 4.4 0 1 0-8.8 0Z",
    "M-4-4H4V4H-4Z",
    "M0-5.2L5 3.8H-5Z",
    "M0-5.6L5.6 0L0 5.6L-5.6 0Z",
    "M0 5.2L5-3.8H-5Z",
    "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
    "M-5-2.8L-2.8-5L0-2.2L2.8-5L5-2.8L2.2 0L5 2.8L2.8 5L0 2.2L-2.8 5L-5 2.8L-2.2 0Z",
    "M0-5.4L5.1-1.7L3.2 4.4H-3.2L-5.1-1.7Z",
)
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Point:
    """A mean at a place, with its interval if there is one."""

    x: float
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Series:
    """A curve on logarithmic axes."""

    style: int
    name: str
    points: tuple[Point, ...]

    def drawn(self) -> list[Point]:
        """The points above zero, which a logarithmic axis can show."""
        return sorted((p for p in self.points if p.mean > 0 and p.x > 0), key=lambda p: p.x)


def curves(
    series: Sequence[Series],
    about: str,
    x_label: str,
    y_label: str,
    floor: float | None = None,
    floor_label: str = "",
) -> Markup | None:
    """Draw curves on two logarithmic axes; `about` is the alternative text. None if there is nothing to draw."""
    visible = [(s, s.drawn()) for s in series if s.drawn()]
    if not visible:
        return None
    xs = sorted({p.x for _, points in visible for p in points})
    means = [p.mean for _, points in visible for p in points] + ([floor] if floor else [])
    highs = [p.high for _, points in visible for p in points if p.high is not None]
    y_low, y_high = min(means) / 1.7, min(max([*means, *highs]) * 1.2, max(means) * 4)
    names = _spread([points[-1].mean for _, points in visible], _log(y_low, y_high, HEIGHT - BOTTOM, TOP))
    tall = max(HEIGHT, round(max(names) + BOTTOM))
    bottom = tall - BOTTOM
    x, y = _log(xs[0] / 1.15, xs[-1] * 1.15, LEFT, WIDTH - RIGHT), _log(y_low, y_high, bottom, TOP)
    parts = [_axes(x, y, _few(xs, x), _decades(y_low, y_high), bottom, x_label, y_label)]
    if floor and y_low < floor:
        at = y(floor)
        parts.append(f'<path class="floor" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="small" x="{LEFT + 6}" y="{at + 14:.1f}">{escape(floor_label)}</text>')
    gap = min(3.0, 14 / len(visible))
    ends = _spread([points[-1].mean for _, points in visible], y)
    for i, ((one, points), end) in enumerate(zip(visible, ends, strict=True)):
        offset = (i - (len(visible) - 1) / 2) * gap
        parts.append(_curve(one, [(x(p.x) + offset, y(p.mean), p) for p in points], end, y, bottom))
    return _svg("".join(parts), about, tall)


def levels(rows: Sequence[tuple[int, str, Sequence[float]]], about: str, label: str) -> Markup | None:
    """Draw a line for each scheduler with a tick at each of its noise levels, on one logarithmic axis."""
    visible = [(style, name, [v for v in values if v > 0]) for style, name, values in rows]
    all_levels = [v for _, _, values in visible for v in values]
    if not all_levels:
        return None
    step, left = 30, RIGHT + 14
    bottom = TOP + step * len(visible) + 6
    low, high = min(all_levels) / 1.2, max(all_levels) * 1.2
    x = _log(low, high, WIDTH - 16, left)  # noise falls from left to right, as during sampling
    parts = []
    for value in _decades(low, high):
        parts.append(f'<path class="rule" d="M{x(value):.1f} {TOP}V{bottom}"/>')
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x(value):.1f}" y="{bottom + 18}">{_tick(value)}</text>'
        )
    for i, (style, name, values) in enumerate(visible):
        at = TOP + step * (i + 0.5) + 3
        ticks = "".join(f"M{x(v):.1f} {at - 8:.1f}v16" for v in values)
        parts.append(
            f'<g class="series c{style % COLOURS}"><title>{escape(name)}: {len(values)} levels</title>'
            f'<path class="thin" d="M{left} {at:.1f}H{WIDTH - 16}"/><path class="line" d="{ticks}"/>'
            f'{_marker(style, 12, at)}<text x="24" y="{at + 4:.1f}">{escape(_short(name, NAME))}</text></g>'
        )
    parts.append(f'<text class="label" text-anchor="middle" x="{(left + WIDTH) / 2}" y="{bottom + 40}">{label}</text>')
    return _svg("".join(parts), about, bottom + 50)


def swatch(style: int) -> Markup:
    """The marker of a style, for tables and headings."""
    return Markup(
        f'<svg class="swatch c{style % COLOURS}" viewBox="-7 -7 14 14" width="14" height="14" aria-hidden="true">'
        f"{_marker(style, 0, 0)}</svg>"
    )


def _svg(inside: str, about: str, height: float) -> Markup:
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(about)}">{inside}</svg>'
    )


def _curve(
    series: Series, places: list[tuple[float, float, Point]], end: float, y: Callable[[float], float], bottom: float
) -> str:
    hollow = " dashed" if series.style >= COLOURS else ""
    bars = []
    for at, _, point in places:
        if point.low is not None and point.high is not None:
            below = y(point.low) if point.low > 0 else bottom
            bars.append(f"M{at:.1f} {max(y(point.high), TOP):.1f}V{min(below, bottom):.1f}")
    line = "M" + "L".join(f"{at:.1f} {height:.1f}" for at, height, _ in places)
    marks = "".join(
        f"<g><title>{escape(series.name)}: {point.mean:.3g} at {point.x:.3g}</title>"
        f"{_marker(series.style, at, height)}</g>"
        for at, height, point in places
    )
    last_x, last_y, _ = places[-1]
    edge = WIDTH - RIGHT
    lead = f'<path class="thin" d="M{last_x + 6:.1f} {last_y:.1f}L{edge + 4} {last_y:.1f}L{edge + 14} {end:.1f}"/>'
    name = f'<text x="{edge + 18}" y="{end + 4:.1f}">{escape(_short(series.name, NAME))}</text>'
    return (
        f'<g class="series c{series.style % COLOURS}">{lead}<path class="bars" d="{"".join(bars)}"/>'
        f'<path class="line{hollow}" d="{line}"/>{marks}{name}</g>'
    )


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    bottom: float,
    x_label: str,
    y_label: str,
) -> str:
    right = WIDTH - RIGHT
    parts = []
    for value in y_ticks:
        parts.append(f'<path class="rule" d="M{LEFT} {y(value):.1f}H{right}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{LEFT - 9}" y="{y(value) + 4:.1f}">{_tick(value)}</text>'
        )
    for value in x_ticks:
        parts.append(f'<path class="axis" d="M{x(value):.1f} {bottom}v5"/>')
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x(value):.1f}" y="{bottom + 20}">{_tick(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" text-anchor="middle" x="{middle}" y="{bottom + 42}">{x_label}</text>')
    turned = f"translate(14 {(TOP + bottom) / 2:g}) rotate(-90)"
    parts.append(f'<text class="label" text-anchor="middle" transform="{turned}">{y_label}</text>')
    return "".join(parts)


def _marker(style: int, x: float, y: float) -> str:
    shape = SHAPES[style % len(SHAPES)]
    hollow = " hollow" if style >= COLOURS else ""
    return f'<path class="mark{hollow}" d="{shape}" transform="translate({x:.1f} {y:.1f})"/>'


def _log(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The function from values (`low` to `high`) to positions (`start` to `end`) on a logarithmic scale."""
    span = math.log(high / low)
    return lambda value: start + (end - start) * math.log(value / low) / span


def _decades(low: float, high: float) -> list[float]:
    """Round values between two others: powers of ten, and more between them if there are fewer than four."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [p * 10.0**e for e in range(first, last + 1) for p in parts if low <= p * 10.0**e <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: -(-len(ticks) // 9)] if ticks else []


def _few(values: Sequence[float], x: Callable[[float], float]) -> list[float]:
    """Ticks at whole numbers, except those too close to a larger one; round values if they are not whole."""
    if not all(v == int(v) for v in values):
        return _decades(values[0] / 1.15, values[-1] * 1.15)
    ticks = [values[-1]]
    for value in reversed(values):
        if x(ticks[-1]) - x(value) >= 26:
            ticks.append(value)
    return ticks


def _spread(values: Sequence[float], y: Callable[[float], float]) -> list[float]:
    """Heights for names beside these values, so that no two overlap."""
    order = sorted(range(len(values)), key=lambda i: y(values[i]))
    places, last = [0.0] * len(values), TOP - LINE + 4.0
    for i in order:
        last = places[i] = max(y(values[i]), last + LINE)
    limit = max(y(min(values)), TOP + LINE * (len(values) - 1) + 4) + LINE
    for i in reversed(order):
        limit = places[i] = min(places[i], limit)
        limit -= LINE
    return places


def _tick(value: float) -> str:
    """The text of a tick."""
    if 1e-3 <= value < 1e5:
        return f"{value:.6g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10.0**exponent
    return ("" if math.isclose(factor, 1) else f"{factor:.2g}·") + "10" + str(exponent).translate(SUPERSCRIPT)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
