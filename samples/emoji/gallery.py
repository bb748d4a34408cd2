"""The contact sheet of the README: a row of prompts in each style, all from one seed.

python samples/emoji/gallery.py samples/emoji/gallery.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import diffgen

NAMES = (
    "red apple",
    "octopus",
    "rocket",
    "cactus",
    "pizza",
    "sunflower",
    "fox",
    "birthday cake",
    "sailboat",
    "unicorn",
)
STYLES = ("noto", "flat", "modern")
SIDE = 96

generator = diffgen.load("emoji")
sheet = Image.new("RGB", (len(NAMES) * SIDE, len(STYLES) * SIDE), "white")
for row, style in enumerate(STYLES):
    for column, name in enumerate(NAMES):
        (picture,) = generator.generate(f"{name}, {style} style", seed=7)
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * SIDE, row * SIDE))
sheet.save(Path(sys.argv[1]), optimize=True)
