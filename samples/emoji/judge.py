"""Judge pictures of scenes: do they show the thing, colour, count, layout, size and place of the prompt?

    python samples/emoji/judge.py work/ -o work/judge-true.json                    # the ceiling: true scenes
    python samples/emoji/judge.py work/ -o work/judge-vae.json --through FOLDER    # through an autoencoder
    python samples/emoji/judge.py work/ -o work/judge-emoji.json --model emoji     # a model, at its defaults

A picture on white is cut into its things: connected parts that are not white. Gaps of up to four pixels are closed, and
crumbs join the part beside them. Each thing is compared, in a square of 16×16, with every thing in every colour of the
style. The nearest one gives its name and its colour.

In a place, the background is estimated from the left and the right edge of the picture, row by row. The thing is the
one that explains the picture best in comparison with this background, over a few positions and sizes. The place is
that of the nearest of many backgrounds, by the same edges.

Pictures of another size are scaled to 128×128. The figures:

  thing    the thing, each of a count, both of a pair
  colour   the colour, if the prompt has one: the nearest picture has it, painted or by nature
  count    exactly so many
  layout   of a pair: the axis (side by side or one above the other) and, with it, the order; of "and" the axis
  size     the longer side: tiny is below 45 pixels, huge above 106
  place    the place, or white
  all      everything that the prompt says

Each figure has its n and Wilson's interval of 95 %. Seen beside held out: combinations of held_out_scenes.json, and as
many others of the same kind.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from places import PLACES, SIDE, background
from scenes import KINDS, Description, Painter, Part, Scene, chinese, colours, draw, english, held_out_scenes, things
from scipy import ndimage

CELLS = 16  # a thing is compared in a square of so many
WHITE = 12  # a pixel is not white if a channel is so much below 255
CRUMB = 0.12  # of the area of the largest: smaller parts are no things
EDGE = 6  # columns at each side that tell the background
TINY, HUGE = 45, 106  # longer sides
BACKGROUNDS = 64  # of each place, to compare with
CANDIDATES = 6  # things of a place that are compared a second time


@dataclass(frozen=True)
class Detection:
    """A thing in a picture."""

    part: Part
    x: float
    y: float
    side: float


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a rate."""
    if not n:
        return 0.0, 1.0
    z, rate = 1.96, right / n
    middle, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def squared(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a transparent square, CELLS × CELLS, RGBa."""
    side = max(picture.size)
    square = Image.new("RGBa", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((CELLS, CELLS), Image.Resampling.BOX)


class Judge:
    """Compares with every thing in every colour of a style, among `names` or all."""

    def __init__(self, painter: Painter, names: Sequence[str] | None = None) -> None:
        self.painter, self.names = painter, list(names or things())
        self.references = cache(self._references)
        self.places = self._places()
        rooms = [background("room", np.random.default_rng((98, k)))[0] for k in range(4 * BACKGROUNDS)]
        self.rooms = [np.asarray(room).astype(np.float32) / 255 for room in rooms]

    def _references(self, style: str) -> tuple[list[Part], np.ndarray, np.ndarray]:
        """(parts, premultiplied colours [N, 768], alpha [N, 256]), both 0 … 1."""
        parts = [
            Part(name, colour)
            for name in self.names
            for colour in (None, *(c for c, natural in colours()[name][style].items() if not natural))
        ]
        squares = np.stack([np.asarray(squared(self.painter.sprite(style, part, half=True))) for part in parts])
        values = squares.astype(np.float32) / 255
        return parts, values[..., :3].reshape(len(parts), -1), values[..., 3].reshape(len(parts), -1)

    def _places(self) -> tuple[list[str | None], np.ndarray]:
        """What the edges of many backgrounds look like, and of white."""
        labels: list[str | None] = [None]
        edges = [self._edges(np.full((SIDE, SIDE, 3), 255, np.uint8))]
        for place in PLACES:
            for k in range(BACKGROUNDS):
                labels.append(place)
                edges.append(self._edges(np.asarray(background(place, np.random.default_rng((99, k)))[0])))
        return labels, np.stack(edges)

    @staticmethod
    def _edges(picture: np.ndarray) -> np.ndarray:
        """float32 [48]: the mean colours of both edges in 16 pieces, from above."""
        left, right = picture[:, :EDGE].astype(np.float32), picture[:, -EDGE:].astype(np.float32)
        rows = (left.mean(1) + right.mean(1)) / 2
        return rows.reshape(16, -1, 3).mean(1).ravel()

    def place(self, picture: np.ndarray) -> str | None:
        labels, edges = self.places
        return labels[int(((edges - self._edges(picture)) ** 2).sum(1).argmin())]

    # Things on white

    def pieces(self, picture: np.ndarray) -> list[tuple[np.ndarray, tuple[slice, slice]]]:
        """The things on white: (mask of the whole picture, its box), the largest first."""
        ink = (255 - picture.min(2)) > WHITE
        ink = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(ink, 3), np.ones((5, 5)))[3:-3, 3:-3] | ink)
        labels, count = ndimage.label(ink, np.ones((3, 3)))
        if not count:
            return []
        areas = ndimage.sum_labels(ink, labels, range(1, count + 1))
        large = [k + 1 for k in range(count) if areas[k] >= max(30, CRUMB * areas.max())]
        if not large:
            return []
        near, (rows, columns) = ndimage.distance_transform_edt(~np.isin(labels, large), return_indices=True)
        crumbs = (labels > 0) & ~np.isin(labels, large) & (near <= 12)
        labels = np.where(crumbs, labels[rows, columns], labels)
        boxes = ndimage.find_objects(labels)
        pieces = [(labels == k, boxes[k - 1]) for k in large]
        return sorted(pieces, key=lambda piece: -int(piece[0].sum()))

    def nearest(self, picture: np.ndarray, style: str, among: Iterable[str] | None = None) -> list[Detection]:
        """The things on white, the largest first."""
        parts, colour, alpha = self.references(style)
        white = colour + np.repeat(1 - alpha, 3, 1)
        some = np.arange(len(parts))
        if among is not None:
            some = np.array([k for k, part in enumerate(parts) if part.thing in set(among)])
        detections = []
        for mask, box in self.pieces(picture):
            cut = np.where(mask[..., None], picture, 255)[box].astype(np.uint8)
            height, width = cut.shape[:2]
            rgba = np.dstack([cut, np.full((height, width), 255, np.uint8)])
            square = np.asarray(squared(Image.fromarray(rgba).convert("RGBa"))).astype(np.float32) / 255
            feature = (square[..., :3] + (1 - square[..., 3:])).ravel()
            k = some[((white[some] - feature) ** 2).sum(1).argmin()]
            middle = ((box[1].start + box[1].stop) / 2, (box[0].start + box[0].stop) / 2)
            detections.append(Detection(parts[k], *middle, max(height, width)))
        return detections

    # Things in places

    def empty(self, picture: np.ndarray, place: str) -> np.ndarray:
        """The place without its thing, float32 [SIDE, SIDE, 3], 0 … 1: by the edges; of a room, the nearest of many."""
        values = picture.astype(np.float32) / 255
        if place == "room":
            outside = np.ones((SIDE, SIDE, 1), dtype=np.float32)
            outside[40:112, 28:100] = 0
            return min(self.rooms, key=lambda room: float((outside * np.abs(room - values)).sum()))
        left, right = np.median(values[:, :EDGE], 1), np.median(values[:, -EDGE:], 1)
        across = np.linspace(0, 1, SIDE, dtype=np.float32)[None, :, None]
        return left[:, None] * (1 - across) + right[:, None] * across

    def in_place(self, picture: np.ndarray, style: str, place: str) -> Detection:
        """The thing that explains the picture best in comparison with the empty place.

        The cost of a thing T with the mask m, where I is the picture and B the empty place: Σ m·((I − T)² − (I − B)²).
        Squares of 16×16 cells give a few candidates; these are compared again at half of the picture's size.
        """
        parts, colour, alpha = self.references(style)
        values, empty = picture.astype(np.float32) / 255, self.empty(picture, place)
        boxes = _boxes(place)
        seen, bare = (
            np.stack(
                [np.asarray(Image.fromarray((p * 255).astype(np.uint8)).resize(
                    (CELLS, CELLS), Image.Resampling.BOX, box), np.float32) for box in boxes]
            ) / 255
            for p in (values, empty)
        )  # fmt: skip
        gain = (seen**2 - (seen - bare) ** 2).sum(-1).reshape(len(boxes), -1)
        own = (colour.reshape(len(parts), -1, 3) ** 2).sum(-1) / np.maximum(alpha, 1e-3)
        cost = alpha @ gain.T - 2 * colour @ seen.reshape(len(boxes), -1).T + own.sum(1)[:, None]
        at = cost.argmin(1)
        best, half = None, (values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]) / 4
        worth = (half - (empty[::2, ::2] + empty[1::2, 1::2]) / 2) ** 2
        for k in cost.min(1).argsort()[:CANDIDATES]:
            left, top, right, bottom = boxes[at[k]]
            x, y = (left + right) / 4, (top + bottom) / 4
            for side in range(round((right - left) / 2) - 2, round((right - left) / 2) + 3):
                thing = np.asarray(self.painter.scaled(style, parts[k], side)).astype(np.float32) / 255
                height, width = thing.shape[:2]
                for dx in (-2, -1, 0, 1, 2):
                    for dy in (-2, -1, 0, 1, 2):
                        row, column = round(y - height / 2) + dy, round(x - width / 2) + dx
                        if row < 0 or column < 0 or row + height > SIDE // 2 or column + width > SIDE // 2:
                            continue
                        window = slice(row, row + height), slice(column, column + width)
                        off = (half[window] - thing[..., :3]) ** 2 - worth[window]
                        total = float((thing[..., 3:] * off).sum())
                        if best is None or total < best[0]:
                            middle = (2 * column + width, 2 * row + height)
                            best = (total, Detection(parts[k], *middle, 2 * side))
        assert best is not None
        return best[1]

    # What is right

    def __call__(self, picture: Image.Image, wanted: Description) -> dict[str, bool]:
        """Whether the picture shows each part of the description, and `all` of them."""
        scaled = picture.convert("RGB")
        if scaled.size != (SIDE, SIDE):
            scaled = scaled.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        values, style = np.asarray(scaled), wanted.style or ""
        place = self.place(values)
        right: dict[str, bool] = {}
        if wanted.place:
            right["place"] = place == wanted.place
            detections = [self.in_place(values, style, wanted.place)]
        else:
            detections = self.nearest(values, style)
        parts = list(wanted.parts) * wanted.count
        if wanted.relation:
            right |= self._pair(values, wanted, detections)
        else:
            right["thing"] = bool(detections) and all(f.part.thing == parts[0].thing for f in detections)
            if parts[0].colour:
                right["colour"] = bool(detections) and all(
                    self._has(f.part, parts[0].colour, style) for f in detections
                )
            if not wanted.place:
                right["count"] = len(detections) == len(parts)
        if wanted.size:
            side = max((f.side for f in detections), default=64)
            right["size"] = side < TINY if wanted.size == "tiny" else side > HUGE
        return {**right, "all": all(right.values())}

    def _pair(self, values: np.ndarray, wanted: Description, detections: list[Detection]) -> dict[str, bool]:
        a, b = wanted.parts
        style = wanted.style or ""
        right = {"count": len(detections) == 2}
        first = next((f for f in detections if f.part.thing == a.thing), None)
        second = next((f for f in detections if f.part.thing == b.thing), None)
        right["thing"] = first is not None and second is not None
        if a.colour or b.colour:
            pairs = [(f, p.colour) for f, p in ((first, a), (second, b)) if p.colour]
            right["colour"] = all(f is not None and self._has(f.part, c, style) for f, c in pairs)
        beside = wanted.relation in ("left of", "right of", "and")
        if len(detections) < 2:
            return {**right, "axis": False, "layout": False}
        one, two = detections[:2]
        right["axis"] = (abs(one.x - two.x) > abs(one.y - two.y)) == beside
        if wanted.relation == "and":
            right["layout"] = right["axis"]
            return right
        if first is None or second is None:  # which of the two is more like the first?
            among = self.nearest(values, style, (a.thing, b.thing))[:2]
            first, second = among if among[0].part.thing == a.thing else among[::-1]
        ahead = (second.x - first.x) if beside else (second.y - first.y)
        right["layout"] = right["axis"] and (ahead > 0) == (wanted.relation in ("left of", "above"))
        return right

    def _has(self, part: Part, colour: str, style: str) -> bool:
        return part.colour == colour or (part.colour is None and colours()[part.thing][style].get(colour, False))


def _boxes(place: str) -> list[tuple[float, float, float, float]]:
    """The squares that are tried. A thing stands on the ground, so the square of a flat one reaches below it."""
    ground = {"sky": 84, "sea": 103}.get(place, 108)
    squares = []
    for dx in range(-9, 10, 3):
        for side in (60, 66, 72):
            for below in range(0, 27, 4):
                left, bottom = 64 + dx - side / 2, min(SIDE, ground + below)
                squares.append((left, bottom - side, left + side, bottom))
    return squares


# Figures


def groups(count: int, names: Sequence[str] | None = None) -> dict[str, list[Scene]]:
    """{"seen colour": scenes, "held-out colour": scenes, …}: at most `count` of each; singles have no held-out ones."""
    scenes = {}
    for kind in KINDS:
        scenes[f"seen {kind}"] = [draw(3, k, mixture={kind: 1.0}, names=names) for k in range(count)]
        if kind != "single":
            scenes[f"held-out {kind}"] = held_out_scenes(kind, count, names=names)
    return scenes


def figures(
    judge: Judge, scenes: dict[str, list[Scene]], make: Callable[[Sequence[Scene]], Sequence[Image.Image]]
) -> dict[str, Any]:
    """{group: {what: {"rate", "interval", "n"}}} of the pictures that `make` makes of each group's scenes."""
    rates: dict[str, Any] = {}
    for name, group in scenes.items():
        verdicts = [judge(picture, scene.description) for picture, scene in zip(make(group), group, strict=True)]
        rates[name] = {}
        for what in ("thing", "colour", "count", "axis", "layout", "size", "place", "all"):
            answers = [verdict[what] for verdict in verdicts if what in verdict]
            if answers:
                low, high = wilson(sum(answers), len(answers))
                rate = round(sum(answers) / len(answers), 3)
                rates[name][what] = {"rate": rate, "interval": [round(low, 3), round(high, 3)], "n": len(answers)}
    return rates


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a row for each group, "rate (low–high)" in each column."""
    columns = ("thing", "colour", "count", "axis", "layout", "size", "place", "all")
    lines = ["| scenes | n | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for name, row in results.items():
        cells = [
            f"{row[c]['rate']:.2f} ({row[c]['interval'][0]:.2f}–{row[c]['interval'][1]:.2f})" if c in row else ""
            for c in columns
        ]
        lines.append(f"| {name} | {row['all']['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(a: argparse.Namespace) -> None:
    painter = Painter(a.work / "sprites.npz")
    names = list(things())[: a.things] if a.things else None
    judge = Judge(painter, names)
    shown: dict[str, list[Image.Image]] = {}

    def make(scenes: Sequence[Scene]) -> list[Image.Image]:
        pictures = [painter(scene) for scene in scenes]
        if a.through:
            from scenes_vae import read_autoencoder, through

            vae, _ = read_autoencoder(a.through)
            arrays = np.stack([np.asarray(p).transpose(2, 0, 1) for p in pictures])
            pictures = [Image.fromarray(p.transpose(1, 2, 0)) for p in through(vae, arrays)]
        elif a.model:
            prompts = [(chinese if a.chinese else english)(scene.description) for scene in scenes]
            pictures = generated(a.model, prompts, steps=a.steps, guidance=a.guidance)
        shown[str(len(shown))] = pictures[:12]
        return pictures

    results = figures(judge, groups(a.count, names), make)
    model = a.model and Path(a.model).name
    settings = {"model": model, "through": a.through and a.through.name, "chinese": a.chinese, "things": a.things}
    settings |= {"steps": a.steps, "guidance": a.guidance}
    a.out.write_text(json.dumps({**settings, "figures": results}, indent=1) + "\n", "utf-8")
    print(table(results))
    if a.sheet:
        from diffgen.images.sheet import sheet

        sheet(list(shown.values())).save(a.sheet)


@cache
def _generator(model: str) -> Any:
    import diffgen

    return diffgen.load(model)


def generated(model: str, prompts: Sequence[str], **options: Any) -> list[Image.Image]:
    """A model's pictures, one seed each; an option that is None has the model's default."""
    options = {name: value for name, value in options.items() if value is not None}
    return [_generator(model).generate(prompt, seed=k, **options)[0] for k, prompt in enumerate(prompts)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--model", help="a name or a folder; without one, true scenes are judged")
    parser.add_argument("--through", type=Path, help="an autoencoder that true scenes go through first")
    parser.add_argument("--count", type=int, default=200, help="at most so many scenes of each group")
    parser.add_argument("--things", type=int, help="only the first so many things, such as 59")
    parser.add_argument("--steps", type=int, help="of the model [its default]")
    parser.add_argument("--guidance", type=float, help="of the model [its default]")
    parser.add_argument("--chinese", action="store_true", help="Chinese prompts")
    parser.add_argument("--sheet", type=Path, help="a contact sheet, a row for each group")
    main(parser.parse_args())
