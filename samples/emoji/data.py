"""Build the emoji data set: pictures, each with a concept and a style, and the concepts' names.

The sources have free licences and come from ordinary package registries:
  noto            Debian `fonts-noto-color-emoji` (SIL OFL 1.1), bitmaps of 109 px
  flat, modern    Microsoft's Fluent Emoji, from npm's `fluentui-emoji` (MIT), SVG
  names           PyPI `emoji` (BSD): English short names, Chinese names; npm `emojibase-data` (MIT): the same, keywords

    python samples/emoji/data.py work/            # writes work/data.npz and work/names.json

A concept is an emoji, named by its English short name. `distinct` removes near-duplicates. `held_out.json`, beside this
file, lists the (concept, style) pairs that the diffusion model is never trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import re
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STYLES = ("noto", "flat", "modern")
SKIN_TONES = {chr(c) for c in range(0x1F3FB, 0x1F400)}
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")  # of a file that also has a "-default" variant
FLAGS = {f"{kind} flag" for kind in ("chequered", "triangular", "black", "white", "rainbow", "transgender", "pirate")}
FLAGS.add("crossed flags")
# SVG files with another name than the emoji's
RENAMED = {
    "blackbird": "black bird",
    "hugging face": "smiling face with open hands",
    "knocked out face": "face with crossed out eyes",
    "phoenix bird": "phoenix",
    "pinata": "piñata",
    "pouting face": "enraged face",
    "red triangle": "red triangle pointed up",
    "stuffedbread": "stuffed flatbread",
    "stuffedbread flat": "stuffed flatbread",
    **{f"person {x}": x for x in ("elf", "fairy", "genie", "mage", "superhero", "supervillain", "vampire", "zombie")},
    **{f"{who} deaf": f"deaf {who}" for who in ("man", "woman", "person")},
    **{f"{who} blonde hair": f"{who} blond hair" for who in ("man", "woman", "person")},
    "man merpeople": "merman",
    "woman merpeople": "mermaid",
    "person merpeople": "merperson",
    **{
        f"{who} {what}": f"{people} {what}"
        for who, people in (("man", "men"), ("woman", "women"), ("person", "people"))
        for what in ("wrestling", "with bunny ears")
    },
}
NEARLY = 6.0  # RMS distance, of 255, at 16x16 RGB: below it, pictures are near-duplicates
ALIKE = 8.0  # the same for pictures with equivalent names
HELD_OUT = Path(__file__).parent / "held_out.json"


def concept(name: str) -> str:
    """The name in lower case, hyphens and underscores as spaces, no other punctuation: "T-Rex" -> "t rex"."""
    name = re.sub(r"[-_]", " ", name.lower())
    return " ".join(re.sub(r"[^\w\s]", "", name).split())


def renamed(name: str) -> str:
    return RENAMED.get(name, name)


def short_name(entry: dict) -> str:
    """The concept of an entry of `emoji.EMOJI_DATA`."""
    return renamed(concept(entry["en"].strip(":").replace("*", "asterisk").replace("#", "hashtag")))


def small(picture: Image.Image) -> np.ndarray:
    """The picture at 16x16 RGB, for comparisons: float32 [768], 0 … 255."""
    return np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()


def on_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def noto(size: int):
    """Yield (concept, picture) for every fully qualified emoji that the font draws as one glyph."""
    import emoji

    font = ImageFont.truetype(str(NOTO), 109)
    for characters, entry in emoji.EMOJI_DATA.items():
        name = short_name(entry)
        regional = any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0xE0020 <= ord(c) <= 0xE007F for c in characters)
        if entry["status"] != emoji.STATUS["fully_qualified"] or regional or SKIN_TONES & set(characters):
            continue
        if name in FLAGS or font.getlength(characters) > 150:  # wider: the font has no single glyph for the sequence
            continue
        square = Image.new("RGBA", (136, 136), "white")
        ImageDraw.Draw(square).text((68, 68), characters, font=font, embedded_color=True, anchor="mm")
        picture = on_white(square)
        if len(set(picture.get_flattened_data())) > 8:  # a missing glyph is an empty or outlined box
            yield name, picture.resize((size, size), Image.Resampling.LANCZOS)


def fluent(folder: Path, style: str, size: int):
    """Yield (concept, picture) for every SVG of one style, over its whole view box."""
    import cairosvg

    paths = {path.stem: path for path in sorted((folder / "icons" / style).glob("*.svg"))}
    for stem, path in paths.items():
        name = renamed(concept(stem.removesuffix("-default")))
        if name in FLAGS or (TONE.search(stem) and TONE.sub("-default", stem) in paths):
            continue
        png = cairosvg.svg2png(url=str(path), output_width=256, output_height=256)
        yield name, on_white(Image.open(io.BytesIO(png))).resize((size, size), Image.Resampling.LANCZOS)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """RMS distances between the rows of a [N, D] and b [M, D]: [N, M]."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0) / a.shape[1])


def plain(name: str) -> str:
    return " ".join(w for w in name.split() if w not in ("man", "person"))


def distinct(features: np.ndarray, names: np.ndarray, styles: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    """Find near-duplicates: (True for pictures to keep, {name: the concept that it is an alias of}).

    Two names that differ only by "man" or "person" ("farmer", "man farmer") are one concept if their pictures are
    near-duplicates in two styles, or in all that they share. The shorter name keeps its pictures; the longer is an
    alias. Of two other concepts with a near-duplicate in a style, the one with the longer name loses that picture.
    """
    shared: dict[tuple[str, str], int] = {}
    close: dict[tuple[str, str], list[tuple[float, int]]] = {}
    by_style = {s: np.flatnonzero(styles == s) for s in STYLES}
    where = {s: set(names[i].tolist()) for s, i in by_style.items()}
    for index in by_style.values():
        distance = distances(features[index], features[index])
        for i, j in np.argwhere(np.triu(distance < ALIKE, 1)):
            first, second = sorted((index[i], index[j]), key=lambda k: (len(names[k].split()), len(names[k]), names[k]))
            pair = (str(names[first]), str(names[second]))
            close.setdefault(pair, []).append((float(distance[i, j]), int(second)))
            shared[pair] = sum(pair[0] in w and pair[1] in w for w in where.values())
    aliases: dict[str, str] = {}
    for (keep, other), matches in sorted(close.items()):
        if plain(keep) == plain(other) and len(matches) >= min(2, shared[keep, other]) and keep not in aliases:
            aliases.setdefault(other, keep)
    keeps = np.array([n not in aliases for n in names.tolist()])
    for (keep, _), matches in sorted(close.items()):
        for distance, picture in matches:
            if distance < NEARLY and keep not in aliases:
                keeps[picture] = False
    return keeps, aliases


def fetch(work: Path) -> Path:
    """Install the two npm packages, unless they are installed: their folder."""
    folder = work / "npm" / "node_modules"
    if not (folder / "fluentui-emoji").exists() or not (folder / "emojibase-data").exists():
        (work / "npm").mkdir(parents=True, exist_ok=True)
        packages = ["fluentui-emoji@1.3.0", "emojibase-data@17.0.0"]
        subprocess.run(["npm", "install", "--no-save", "--prefix", str(work / "npm"), *packages], check=True)
    return folder


def only(candidates: dict[str, list[str]], taken: set[str]) -> dict[str, list[str]]:
    """The texts that belong to one concept only and are not in `taken`."""
    owners: dict[str, set[str]] = {}
    for name, texts in candidates.items():
        for text in texts:
            owners.setdefault(text, set()).add(name)
    return {
        name: sorted({t for t in texts if t and len(owners[t]) == 1 and t not in taken})
        for name, texts in candidates.items()
    }


def pairs(tags: dict[str, list[str]]) -> dict[str, list[str]]:
    """Up to two pairs of keywords ("woman space") for each concept that no other concept has; chosen by a hash."""
    owners: dict[tuple[str, str], int] = {}
    for keywords in tags.values():
        for pair in itertools.combinations(sorted(set(keywords)), 2):
            owners[pair] = owners.get(pair, 0) + 1
    chosen = {}
    for name, keywords in tags.items():
        unique = [p for p in itertools.combinations(sorted(set(keywords)), 2) if owners[p] == 1]
        chosen[name] = [f"{a} {b}" for a, b in sorted(unique, key=lambda p: number(name, *p))[:2]]
    return chosen


def few(texts: list[str]) -> list[str]:
    """At most four of the texts, chosen by a hash, sorted."""
    return sorted(sorted(texts, key=number)[:4])


def number(*texts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(texts).encode()).digest()[:8], "big")


def name_table(folder: Path, concepts: list[str], aliases: dict[str, str]) -> dict[str, dict]:
    """{concept: {"emoji": …, "aliases", "keywords", "zh", "zh_keywords": [texts that mean only this concept]}}.

    A keyword (from CLDR, by emojibase) is kept if no other concept has it and no other name contains it as a word. A
    concept with fewer than two keywords gets pairs of keywords. At most four are kept. A Chinese name is kept if no
    other concept has it.
    """
    import emoji

    emoji.config.load_language("zh")
    character: dict[str, str] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == emoji.STATUS["fully_qualified"]:
            character.setdefault(short_name(entry), characters)
    english, chinese = (
        {e["emoji"].replace("\ufe0f", ""): e for e in json.loads((folder / lang / "data.json").read_text("utf-8"))}
        for lang in ("en", "zh")
    )
    tags, zh, zh_tags = {}, {}, {}
    for name in concepts:
        key = character[name].replace("\ufe0f", "")
        tags[name] = [concept(t) for t in english[key].get("tags", []) if t.isascii()]
        labels = [chinese[key]["label"], emoji.EMOJI_DATA[character[name]].get("zh", "").strip(":")]
        zh[name] = [concept(t) for t in labels if t and len(t) <= 14]
        zh_tags[name] = [concept(t) for t in chinese[key].get("tags", []) if len(t) <= 8 and not t.isascii()]
    aliases_of = {name: [a for a, c in aliases.items() if c == name] for name in concepts}
    names = {*concepts, *aliases}
    words: dict[str, set[str]] = {}  # {word: concepts with it in a name}
    for name in concepts:
        for word in f"{name} {' '.join(aliases_of[name])}".split():
            words.setdefault(word, set()).add(name)
    keywords = {name: [t for t in texts if words.get(t, {name}) == {name}] for name, texts in only(tags, names).items()}
    keyword_pairs = only(pairs(tags), names | {text for texts in keywords.values() for text in texts})
    zh = only(zh, set())
    zh_keywords = only(zh_tags, {t for texts in zh.values() for t in texts})
    return {
        name: {
            "emoji": character[name],
            "aliases": sorted(aliases_of[name]),
            "keywords": few(keywords[name]) + (keyword_pairs[name] if len(keywords[name]) < 2 else []),
            "zh": zh[name],
            "zh_keywords": few(zh_keywords[name]),
        }
        for name in concepts
    }


def held_out_pairs(names: list[str], styles: list[str]) -> list[tuple[str, str]]:
    """Choose, by a hash, a tenth of the (concept, style) pairs of concepts with all styles, at most one of each."""
    styles_of: dict[str, set[str]] = {}
    for name, style in zip(names, styles, strict=True):
        styles_of.setdefault(name, set()).add(style)
    complete = sorted(n for n, s in styles_of.items() if len(s) == len(STYLES))
    chosen = sorted(complete, key=lambda n: number("held out", n))[: len(complete) * len(STYLES) // 10]
    return sorted((n, STYLES[number("style", n) % len(STYLES)]) for n in chosen)


def trained(names: np.ndarray, styles: np.ndarray) -> np.ndarray:
    """True for the pictures that the diffusion model is trained on: all except the pairs in `held_out.json`."""
    held_out = {tuple(pair) for pair in json.loads(HELD_OUT.read_text("utf-8"))}
    return np.array([pair not in held_out for pair in zip(names.tolist(), styles.tolist(), strict=True)], dtype=bool)


def build(work: Path, size: int) -> None:
    if not NOTO.exists():
        raise SystemExit(f"{NOTO} is missing: apt-get install fonts-noto-color-emoji")
    folder = fetch(work)
    pictures, names, styles = [], [], []
    for style in STYLES:
        drawn = set()
        for name, picture in noto(size) if style == "noto" else fluent(folder / "fluentui-emoji", style, size):
            if name not in drawn:
                drawn.add(name)
                pictures.append(np.asarray(picture))
                names.append(name)
                styles.append(style)
        print(f"{style}: {len(drawn)} pictures")
    keeps, aliases = distinct(
        np.stack([small(Image.fromarray(p)) for p in pictures]), np.array(names), np.array(styles)
    )
    names, styles = np.array(names)[keeps], np.array(styles)[keeps]
    concepts = sorted(set(names.tolist()))
    aliases = {a: c for a, c in aliases.items() if c in concepts}
    table = name_table(folder / "emojibase-data", concepts, aliases)
    (work / "names.json").write_text(json.dumps(table, ensure_ascii=False, indent=0) + "\n", "utf-8")
    held_out = held_out_pairs(names.tolist(), styles.tolist())
    HELD_OUT.write_text(json.dumps([list(pair) for pair in held_out], ensure_ascii=False, indent=0) + "\n", "utf-8")
    temporary = work / "data.tmp.npz"
    np.savez_compressed(temporary, pictures=np.stack(pictures)[keeps], names=names, styles=styles)
    temporary.rename(work / "data.npz")
    print(f"{len(names)} pictures of {len(concepts)} concepts, {size}x{size} -> {work / 'data.npz'}")
    print(f"{(~keeps).sum()} near-duplicates left out; {len(aliases)} aliases; {len(held_out)} pairs held out")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    build(arguments.work, arguments.size)
