"""How often is the picture of what was asked for?  Nearest-neighbour accuracy of a finished model.

    python samples/emoji/check.py work/ --model emoji --prompts 100       # or a folder

Draws prompts at random from the captions, makes one picture of each at the model's defaults, shrinks it to 16x16 RGB
with Pillow's BOX filter, and looks for the nearest (Euclidean) among the training pictures of that style. Prints the
accuracy and writes a contact sheet of the first 48 to work/check.png.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
from data import caption
from PIL import Image

import diffgen
from diffgen.models.find import find
from diffgen.models.info import info


def small(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()


def main(work: Path, model: str, prompts: int, seed: int) -> None:
    card = info(find(model))
    data = np.load(work / "data.npz")
    trained = np.isin(data["names"], card["concepts"]) & np.isin(data["styles"], card["styles"])
    names, styles = data["names"][trained], data["styles"][trained]
    pictures = data["pictures"][trained]
    features = np.stack([small(Image.fromarray(p)) for p in pictures])
    generator, drawn, right, began = diffgen.load(model), [], 0, time.perf_counter()
    draw = random.Random(seed)
    for k in draw.sample(range(len(names)), prompts):
        picture = generator.generate(caption(names[k], styles[k]), seed=draw.randrange(2**32))[0]
        of_style = np.flatnonzero(styles == styles[k])
        nearest = of_style[np.square(features[of_style] - small(picture)).sum(1).argmin()]
        right += names[nearest] == names[k]
        drawn.append((picture, Image.fromarray(pictures[k])))
        if names[nearest] != names[k]:
            print(f"  asked for {caption(names[k], styles[k])}; nearest is {names[nearest]}")
    seconds = (time.perf_counter() - began) / prompts
    sheet = Image.new("RGB", (16 * 66, 6 * 66), "white")
    for i, (made, real) in enumerate(drawn[:48]):
        x, y = i % 16 * 66, i // 16 * 132
        sheet.paste(made, (x, y))
        sheet.paste(real, (x, y + 66))
    sheet.save(work / "check.png")
    figures = {"accuracy": right / prompts, "prompts": prompts, "seed": seed, "concepts": len(set(names))}
    (work / "check.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{right} of {prompts} right ({len(set(names))} concepts), {seconds:.2f} s each")
    print(f"{work / 'check.png'}: made above, real below")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.work, arguments.model, arguments.prompts, arguments.seed)
