"""The pictures that the adapters are trained on, each a folder for `diffgen finetune`."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from diffgen.errors import InputError

DELFT, TRANSFORMED = 512, 2000  # pictures
CAPTIONS = ("<dropling>", "a <dropling>", "<dropling>, flat style")
SIDE = 64  # pixels of a drawing
BODY, EYE = "#8457dd", "#2a1a4a"


def delft(data: Path, folder: Path) -> None:
    """Pictures of the data in blue. White stays white, because the autoencoder was trained on white backgrounds."""

    def blue(picture: Image.Image, rng: random.Random) -> Image.Image:
        return ImageOps.colorize(picture.convert("L"), "#0a2463", "white", mid="#5b8fe0")

    _changed(data, folder, DELFT, blue)


def transformed(data: Path, folder: Path) -> None:
    """Pictures of the data rotated, scaled, moved and sometimes mirrored, on white.

    The model has seen its pictures so often that a caption alone determines the edges. Of these, only the map shows
    where the edges are.
    """
    _changed(data, folder, TRANSFORMED, transform)


def transform(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture in another place, at another size and angle, on white."""
    width, height = picture.size
    angle = math.radians(rng.uniform(-45, 45))
    wide, high = rng.uniform(0.5, 1.05) * rng.choice((-1, 1)), rng.uniform(0.5, 1.05)
    x, y = width * (0.5 + rng.uniform(-0.15, 0.15)), height * (0.5 + rng.uniform(-0.15, 0.15))
    cos, sin = math.cos(angle), math.sin(angle)
    # From a position in the new picture to one in the old: subtract (x, y), rotate and scale back, add the centre.
    a, b, c, d = cos / wide, sin / wide, -sin / high, cos / high
    matrix = (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white")


def droplings(data: Path, folder: Path) -> None:
    """Eight drawings that differ a little, so that the word learns what they share. `data` is not used."""
    names = []
    for i in range(8):
        picture = dropling(0.9 + 0.03 * (i % 3), 0.5 + 0.02 * math.cos(i), 0.52 + 0.02 * math.sin(i), SIDE)
        names.append((picture, {"text": list(CAPTIONS)}))
    _write(folder, names)


def dropling(size: float, x: float, y: float, side: int) -> Image.Image:
    """A drop with eyes; its size and centre (x, y) are fractions of the picture."""
    s = 8 * side  # drawn large, then reduced: no jagged edges
    picture = Image.new("RGB", (s, s), "white")
    draw = ImageDraw.Draw(picture)

    def place(across: float, down: float) -> tuple[float, float]:
        """Pixels of a position relative to the drop's centre, in units of its size."""
        return (x + across * size) * s, (y + down * size) * s

    def oval(across: float, down: float, wide: float, high: float, colour: str) -> None:
        draw.ellipse((*place(across - wide, down - high), *place(across + wide, down + high)), colour)

    draw.polygon([place(0, -0.52), place(-0.33, -0.02), place(0.33, -0.02)], BODY)
    oval(0, 0.12, 0.38, 0.36, BODY)
    oval(-0.17, 0.1, 0.1, 0.14, EYE)
    oval(0.17, 0.1, 0.1, 0.14, EYE)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def _changed(data: Path, folder: Path, count: int, change: Callable[[Image.Image, random.Random], Image.Image]) -> None:
    """So many training pictures of the data, changed, with their captions. Raises InputError without captions."""
    path, rng = data / "metadata.jsonl", random.Random(0)
    if not path.is_file():
        raise InputError(f"{data} has no captions", "add a metadata.jsonl with captions to the folder")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    kept = [line for line in lines if not line.get("held_out")]
    chosen = rng.sample(kept, min(count, len(kept)))
    pictures = []
    for line in chosen:
        with Image.open(data / line["file_name"]) as picture:
            pictures.append(
                (change(picture.convert("RGB"), rng), {k: line[k] for k in ("text", "weights") if k in line})
            )
    _write(folder, pictures)


def _write(folder: Path, pictures: list[tuple[Image.Image, dict[str, Any]]]) -> None:
    """Write the folder at once, so that an interrupted one is not taken for complete."""
    new = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    lines = []
    for i, (picture, about) in enumerate(pictures):
        picture.save(new / f"{i:04}.png")
        lines.append(json.dumps({"file_name": f"{i:04}.png", **about}, ensure_ascii=False) + "\n")
    (new / "metadata.jsonl").write_text("".join(lines), "utf-8")
    new.rename(folder)
