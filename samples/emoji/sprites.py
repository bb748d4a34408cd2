"""Cut the things out of the emoji pictures, and paint them in other colours.

    python samples/emoji/sprites.py work/         # -> work/sprites.npz, work/singles.npz; needs what data.py needs

`things.csv` lists the things that compose: the concept, its Chinese name and measure word, and, where they differ from
the concept, the English name and its plural. Every thing is there in the three styles of `data.py`.

A thing is painted in another colour by moving its main colour in Oklab (Ottosson 2020), and nothing else: the pixels
round its main hue, or its light or its dark grey where no hue is larger. A thing and a colour go together in a style if
at least `MOVED` of the area moves. Where the thing has the colour by nature, that picture is the plain one.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data import NOTO, STYLES, concept, fetch, renamed, short_name
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SIDE = 112  # the longer side of a stored picture
MOVED = 0.4  # least part of a thing's area that takes another colour
FAR = 0.1  # distance in Oklab from which on a pixel counts as moved
NATURAL, NEAR = 0.10, 0.17  # a thing's main colour has that name; is too like it to be painted so: distances in Oklab
COLOURS = {
    "red": "#dc2430",
    "orange": "#f5821f",
    "yellow": "#fdd31d",
    "green": "#31a83f",
    "blue": "#2b68e0",
    "purple": "#8a3fc8",
    "pink": "#ff86bd",
    "black": "#2a2a30",
}


@dataclass(frozen=True)
class Thing:
    """What a thing is called."""

    concept: str  # as in work/names.json
    name: str
    plural: str
    chinese: str
    measure: str  # the Chinese measure word


def plural(name: str) -> str:
    """The regular plural of an English noun."""
    if name.endswith(("s", "sh", "ch", "x", "z")):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") and name[-2] not in "aeiou" else f"{name}s"


def read_things(path: Path = HERE / "things.csv") -> dict[str, Thing]:
    """{name: thing}, in the order of the file: the first 59 are those of the gate."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    names = [row["name"] or row["concept"] for row in rows]
    return {
        name: Thing(row["concept"], name, row["plural"] or plural(name), row["chinese"], row["measure"])
        for name, row in zip(names, rows, strict=True)
    }


# Oklab

_TO_LMS = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]], dtype=np.float32,
)  # fmt: skip
_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]], dtype=np.float32,
)  # fmt: skip
_VALUES = np.arange(256, dtype=np.float32) / 255
_LINEAR = np.where(_VALUES <= 0.04045, _VALUES / 12.92, ((_VALUES + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 [..., 3] to Oklab float32 [..., 3]: lightness 0 … 1, a, b."""
    return np.cbrt(_LINEAR[rgb] @ _TO_LMS.T) @ _TO_LAB.T


def _to_linear(lab: np.ndarray) -> np.ndarray:
    return (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """Oklab [..., 3] to sRGB uint8; a colour that sRGB lacks loses chroma until it fits, at most six times a tenth."""
    lab = lab.astype(np.float32).copy()
    linear = _to_linear(lab)
    for _ in range(6):
        out = ((linear < -0.003) | (linear > 1.003)).any(-1)
        if not out.any():
            break
        lab[out, 1:] *= 0.9
        linear[out] = _to_linear(lab[out])
    linear = linear.clip(0, 1)
    values = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (values * 255).round().astype(np.uint8)


TARGETS = {
    name: to_oklab(np.array([int(code[k : k + 2], 16) for k in (1, 3, 5)], dtype=np.uint8))
    for name, code in COLOURS.items()
}


def _ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a line between; the other way round for low > high."""
    return ((x - low) / (high - low)).clip(0, 1)


# A thing's main colour


@dataclass(frozen=True)
class MainColour:
    """The part of a picture that takes another colour."""

    weights: np.ndarray  # float32 [H, W]: how much of each pixel moves, 0 … 1
    mean: np.ndarray  # Oklab [3]
    grey: bool
    share: float  # of the thing's area


def main_colour(picture: np.ndarray, lab: np.ndarray) -> MainColour:
    """The main colour of a picture, RGBA uint8 [H, W, 4] with its Oklab [H, W, 3]."""
    alpha = picture[..., 3].astype(np.float32) / 255
    lightness, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    hue = np.degrees(np.arctan2(lab[..., 2], lab[..., 1])) % 360
    coloured = _ramp(chroma, 0.025, 0.06)
    centres = np.arange(0, 360, 10)
    counts = np.histogram(hue, 72, (0, 360), weights=alpha * coloured)[0]
    middles = np.arange(72) * 5 + 2.5
    within = np.abs((middles - centres[:, None] + 180) % 360 - 180) <= 35
    centre = centres[(within @ counts).argmax()]
    apart = np.abs((hue - centre + 180) % 360 - 180)
    plain = 1 - coloured
    candidates = [
        (1.3, False, coloured * _ramp(apart, 62, 42)),
        (1.0, True, plain * _ramp(lightness, 0.38, 0.52)),
        (1.0, True, plain * _ramp(lightness, 0.62, 0.48)),
    ]
    areas = [float((alpha * weights).sum()) for _, _, weights in candidates]
    best = max(range(3), key=lambda k: candidates[k][0] * areas[k])
    grey, weights = candidates[best][1:]
    if grey:  # a faint tint is grey too
        weights = (_ramp(lightness, 0.38, 0.52) if best == 1 else _ramp(lightness, 0.62, 0.48)) * _ramp(
            chroma, 0.09, 0.05
        )
    else:  # and a faint colour is a colour, if the main colour is faint
        strength = float((alpha * weights * chroma).sum() / max(1e-6, areas[best]))
        weights = _ramp(chroma, *np.minimum((0.3 * strength, 0.6 * strength), (0.025, 0.06))) * _ramp(apart, 62, 42)
    mass = (alpha * weights)[..., None]
    mean = (lab * mass).sum((0, 1)) / max(1e-6, float(mass.sum()))
    return MainColour(weights, mean, grey, float(mass.sum() / alpha.sum()))


def painted(picture: np.ndarray, colour: str) -> tuple[np.ndarray, float]:
    """(the picture with its main colour moved to that one, the part of its area that moved), RGBA uint8 [H, W, 4]."""
    lab, target = to_oklab(picture[..., :3]), TARGETS[colour]
    main = main_colour(picture, lab)
    chroma, hue = np.hypot(*target[1:]), np.arctan2(target[2], target[1])
    contrast = {"black": 0.5, "yellow": 0.75}.get(colour, 0.9)
    moved = np.empty_like(lab)
    moved[..., 0] = (target[0] + contrast * (lab[..., 0] - main.mean[0])).clip(0.04, 0.99)
    if main.grey:
        strength = chroma * np.exp(-(((moved[..., 0] - target[0]) / 0.4) ** 2))
        turn = 0.0
    else:
        own = np.hypot(lab[..., 1], lab[..., 2])
        strength = chroma * (own / np.hypot(*main.mean[1:])).clip(0.25, 1.3)
        turn = np.arctan2(lab[..., 2], lab[..., 1]) - np.arctan2(main.mean[2], main.mean[1])
        turn = 0.35 * ((turn + np.pi) % (2 * np.pi) - np.pi)  # a little of the shading's own hue
    moved[..., 1], moved[..., 2] = strength * np.cos(hue + turn), strength * np.sin(hue + turn)
    mixed = lab + main.weights[..., None] * (moved - lab)
    alpha = picture[..., 3].astype(np.float32)
    far = np.linalg.norm(mixed - lab, axis=-1) > FAR
    return np.concatenate([from_oklab(mixed), picture[..., 3:]], -1), float((alpha * far).sum() / alpha.sum())


def _turned(a: np.ndarray, b: np.ndarray) -> float:
    """Degrees between the hues of two colours in Oklab."""
    difference = np.arctan2(a[2], a[1]) - np.arctan2(b[2], b[1])
    return float(np.degrees(np.abs((difference + np.pi) % (2 * np.pi) - np.pi)))


def colours_of(picture: np.ndarray) -> dict[str, bool]:
    """{colour: whether the thing has it by nature} of all colours that go with a picture."""
    main = main_colour(picture, to_oklab(picture[..., :3]))
    colours = {}
    for name, target in TARGETS.items():
        distance = float(np.linalg.norm(main.mean - target))
        if distance > NEAR and painted(picture, name)[1] >= MOVED:
            colours[name] = False
        elif distance <= NATURAL and main.share >= MOVED and main.grey == (name == "black"):
            if not main.grey and _turned(main.mean, target) > 18:
                continue
            colours[name] = True
    return colours


# The pictures


def cut(picture: Image.Image) -> np.ndarray:
    """The thing alone, RGBA uint8 [h, w, 4], cropped to its alpha; the longer side has SIDE pixels."""
    alpha = np.asarray(picture.getchannel("A")) > 12
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    scale = SIDE / max(box[2] - box[0], box[3] - box[1])
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    small = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS, box)  # premultiplied: no dark edges
    return np.asarray(small.convert("RGBA"))


def pictures(npm: Path, style: str, concepts: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """Yield (concept, RGBA picture) of one style, each concept once."""
    import cairosvg
    import emoji

    done: set[str] = set()
    if style == "noto":
        font = ImageFont.truetype(str(NOTO), 109)
        for characters, entry in emoji.EMOJI_DATA.items():
            name = short_name(entry)
            if name in concepts - done and entry["status"] == emoji.STATUS["fully_qualified"]:
                done.add(name)
                square = Image.new("RGBA", (160, 160))
                ImageDraw.Draw(square).text((80, 80), characters, font=font, embedded_color=True, anchor="mm")
                yield name, square
        return
    for path in sorted((npm / "fluentui-emoji" / "icons" / style).glob("*.svg")):
        name = renamed(concept(path.stem.removesuffix("-default")))
        if name in concepts - done:
            done.add(name)
            png = cairosvg.svg2png(url=str(path), output_width=256, output_height=256)
            yield name, Image.open(io.BytesIO(png)).convert("RGBA")


def build(work: Path) -> None:
    """Write work/sprites.npz and, beside this file, which colours go with which thing: colours.json."""
    things, npm = read_things(), fetch(work)
    of_concept = {thing.concept: name for name, thing in things.items()}
    cut_out: dict[str, np.ndarray] = {}
    colours: dict[str, dict[str, dict[str, bool]]] = {name: {} for name in things}
    for style in STYLES:
        for name, picture in pictures(npm, style, set(of_concept)):
            key = of_concept[name]
            cut_out[f"{style}/{key}"] = cut(picture)
            colours[key][style] = colours_of(cut_out[f"{style}/{key}"])
    missing = [f"{style}/{name}" for style in STYLES for name in things if f"{style}/{name}" not in cut_out]
    if missing:
        raise SystemExit(f"no picture of {', '.join(missing)}")
    save(work / "sprites.npz", cut_out)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in colours.items())
    (HERE / "colours.json").write_text(f"{{\n{lines}\n}}\n", "utf-8")
    print(f"{len(things)} things in {len(STYLES)} styles -> {work / 'sprites.npz'}")


def build_singles(work: Path) -> None:
    """Write work/singles.npz: the pictures of work/data.npz, cut out, {"style/concept": RGBA}."""
    npm = fetch(work)
    with np.load(work / "data.npz") as file:
        keys = [f"{style}/{name}" for name, style in zip(file["names"].tolist(), file["styles"].tolist(), strict=True)]
    cut_out: dict[str, np.ndarray] = {}
    for style in STYLES:
        names = {key.removeprefix(f"{style}/") for key in keys if key.startswith(f"{style}/")}
        cut_out |= {f"{style}/{name}": cut(picture) for name, picture in pictures(npm, style, names)}
    if missing := sorted(set(keys) - set(cut_out)):
        raise SystemExit(f"no picture of {', '.join(missing[:10])}")
    save(work / "singles.npz", cut_out)
    print(f"{len(cut_out)} pictures -> {work / 'singles.npz'}")


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    folder = parser.parse_args().work
    build(folder)
    build_singles(folder)
