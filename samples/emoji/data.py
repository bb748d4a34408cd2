"""Build the emoji data set: one array of pictures, one list of (concept, style) captions.

Sources, both under free licences and both from ordinary package registries:
  noto            Debian `fonts-noto-color-emoji` (SIL OFL 1.1), bitmaps of 109 px
  flat, modern    npm `fluentui-emoji` (MIT), SVG

    python samples/emoji/data.py work/            # writes work/data.npz
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STYLES = ("noto", "flat", "modern")
SKIN_TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")  # of a file that has a "-default" beside it
FLAGS = {f"{kind} flag" for kind in ("chequered", "triangular", "black", "white", "rainbow", "transgender", "pirate")}
FLAGS.add("crossed flags")


def concept(name: str) -> str:
    """Lower case; hyphens and underscores become spaces; other punctuation is dropped: "T-Rex" -> "t rex"."""
    name = re.sub(r"[-_]", " ", name.lower())
    return " ".join(re.sub(r"[^\w\s]", "", name).split())


def caption(name: str, style: str) -> str:
    return f"{name}, {style} style"


def on_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def noto(size: int):
    """Yield (concept, picture) for every fully qualified emoji that the font draws as one glyph."""
    import emoji

    font = ImageFont.truetype(str(NOTO), 109)
    for characters, entry in emoji.EMOJI_DATA.items():
        name = concept(entry["en"].strip(":"))
        regional = any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0xE0020 <= ord(c) <= 0xE007F for c in characters)
        if entry["status"] != emoji.STATUS["fully_qualified"] or regional or SKIN_TONES & set(characters):
            continue
        if name in FLAGS or font.getlength(characters) > 150:  # wider: the font has no glyph for the whole sequence
            continue
        square = Image.new("RGBA", (136, 136), "white")
        ImageDraw.Draw(square).text((68, 68), characters, font=font, embedded_color=True, anchor="mm")
        picture = on_white(square)
        if len(set(picture.get_flattened_data())) > 8:  # a missing glyph is an empty or an outlined box
            yield name, picture.resize((size, size), Image.Resampling.LANCZOS)


def fluent(folder: Path, style: str, size: int):
    """Yield (concept, picture) for every SVG of one style, over its whole view box."""
    import cairosvg

    paths = {path.stem: path for path in sorted((folder / "icons" / style).glob("*.svg"))}
    for stem, path in paths.items():
        name = concept(stem.removesuffix("-default"))
        if name in FLAGS or (TONE.search(stem) and TONE.sub("-default", stem) in paths):
            continue
        png = cairosvg.svg2png(url=str(path), output_width=256, output_height=256)
        yield name, on_white(Image.open(io.BytesIO(png))).resize((size, size), Image.Resampling.LANCZOS)


def fetch_fluent(work: Path) -> Path:
    folder = work / "npm" / "node_modules" / "fluentui-emoji"
    if not folder.exists():
        (work / "npm").mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "install", "--no-save", "--prefix", str(work / "npm"), "fluentui-emoji@1.3.0"], check=True
        )
    return folder


def build(work: Path, size: int) -> None:
    if not NOTO.exists():
        raise SystemExit(f"{NOTO} is missing; install it: apt-get install fonts-noto-color-emoji")
    folder = fetch_fluent(work)
    pictures, names, styles = [], [], []
    for style in STYLES:
        seen = set()
        for name, picture in noto(size) if style == "noto" else fluent(folder, style, size):
            if name not in seen:
                seen.add(name)
                pictures.append(np.asarray(picture))
                names.append(name)
                styles.append(style)
        print(f"{style}: {len(seen)} pictures")
    temporary = work / "data.tmp.npz"
    np.savez_compressed(temporary, pictures=np.stack(pictures), names=np.array(names), styles=np.array(styles))
    temporary.rename(work / "data.npz")
    print(f"{len(names)} pictures of {len(set(names))} concepts, {size}x{size} -> {work / 'data.npz'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    build(arguments.work, arguments.size)
