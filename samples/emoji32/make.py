"""Build samples/emoji32: 32×32 emoji in three classes (animal, face, food), each in up to three styles.

    python samples/emoji/data.py work/            # draws all emoji at 64×64: work/data.npz, work/names.json
    python samples/emoji32/make.py work/

The classes are Unicode's subgroups, from npm's `emojibase-data`, which the first command installs in work/npm.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"face-": "face", "animal-": "animal", "food-": "food"}  # by prefix of the subgroup's name
SIDE = 32
COLOURS = 64  # of the palette: half the bytes, hardly visible


def classes(work: Path) -> dict[str, str]:
    """{concept: class} for the concepts that belong to a class."""
    folder = work / "npm" / "node_modules" / "emojibase-data"
    subgroups = json.loads((folder / "meta" / "groups.json").read_text("utf-8"))["subgroups"]
    of_emoji = {
        entry["emoji"].replace("\ufe0f", ""): subgroups[str(entry["subgroup"])]
        for entry in json.loads((folder / "en" / "data.json").read_text("utf-8"))
        if "subgroup" in entry
    }
    class_of = {}
    for concept, names in json.loads((work / "names.json").read_text("utf-8")).items():
        subgroup = of_emoji[names["emoji"].replace("\ufe0f", "")]
        for beginning, name in CLASSES.items():
            if subgroup.startswith(beginning):
                class_of[concept] = name
    return class_of


def make(work: Path, out: Path) -> None:
    data, class_of = np.load(work / "data.npz"), classes(work)
    written = 0
    for pixels, concept, style in zip(data["pictures"], data["names"].tolist(), data["styles"].tolist(), strict=True):
        if concept in class_of:
            path = out / class_of[concept] / f"{concept.replace(' ', '-')}-{style}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
            small.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
            written += 1
    print(f"{written} pictures -> {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    make(arguments.work, arguments.out)
