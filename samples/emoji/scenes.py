"""Scenes of things: colours, counts, two things and where, places, sizes. A scene is a function of (seed, index).

    scene = draw(seed=0, index=7)                      # nothing of it is held out
    picture = Painter(Path("work/sprites.npz"))(scene)  # RGB, 128x128
    captions(scene.description)                        # {text: weight}, English and Chinese

    python samples/emoji/scenes.py work/ --sheet sheet.png      # a contact sheet of each kind
    python samples/emoji/scenes.py work/ --lists                # held_out_scenes.json anew

The grammar, in both languages:

    scene := thing | size thing | count things | thing relation thing | thing place       thing := [colour] name

`held_out_scenes.json` lists the combinations that nothing is trained on, in no kind of scene, no style and neither
language. They were chosen by a hash of the names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from places import PLACES, SIDE, background
from sprites import COLOURS, HERE, Thing, painted, read_things

STYLES = ("noto", "flat", "modern")
COUNTS = {2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四")}
RELATIONS = {
    "left of": "{a}在{b}左边",
    "right of": "{a}在{b}右边",
    "above": "{a}在{b}上方",
    "below": "{a}在{b}下方",
    "and": "{a}和{b}",
}
SIZES = {"tiny": "微小", "huge": "巨大"}
WHERE = {
    "snow": ("in the snow", "在雪地里"),
    "grass": ("on the grass", "在草地上"),
    "sea": ("in the sea", "在海里"),
    "night": ("at night", "在夜里"),
    "desert": ("in the desert", "在沙漠里"),
    "sky": ("in the sky", "在天空中"),
    "room": ("in a room", "在房间里"),
}
CHINESE_COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "black": "黑色",
}
CHINESE_STYLES = {"noto": "诺托", "flat": "扁平", "modern": "现代"}
KINDS = ("single", "colour", "count", "pair", "size", "place")
MIXTURE = {"single": 0.14, "colour": 0.22, "count": 0.2, "pair": 0.24, "size": 0.08, "place": 0.12}
STYLED = 0.75  # part of the captions that say the style
GATE = 59  # things of the first trial: the first of things.csv
HELD_OUT = HERE / "held_out_scenes.json"


# What a scene is


@dataclass(frozen=True)
class Part:
    """One thing of a scene."""

    thing: str
    colour: str | None = None


@dataclass(frozen=True)
class Description:
    """What captions say of a scene."""

    parts: tuple[Part, ...]  # two with a relation, else one
    style: str | None  # None only where a caption does not say it
    count: int = 1
    relation: str | None = None
    size: str | None = None
    place: str | None = None  # None is white

    @property
    def kind(self) -> str:
        if self.relation:
            return "pair"
        if self.place:
            return "place"
        if self.size:
            return "size"
        if self.count > 1:
            return "count"
        return "colour" if self.parts[0].colour else "single"


@dataclass(frozen=True)
class Box:
    """Where one thing is: the middle and the longer side, in pixels."""

    x: float
    y: float
    side: int


@dataclass(frozen=True)
class Scene:
    """A description and what it leaves open."""

    description: Description
    boxes: tuple[Box, ...]  # of a pair, of the first thing and of the second
    seed: int  # of the place


@cache
def things() -> dict[str, Thing]:
    return read_things()


@cache
def colours() -> dict[str, dict[str, dict[str, bool]]]:
    """{thing: {style: {colour: whether it has it by nature}}}, as `sprites.py` writes it."""
    table: dict[str, dict[str, dict[str, bool]]] = json.loads((HERE / "colours.json").read_text("utf-8"))
    return table


# What is held out


def number(*texts: object) -> int:
    """64 bits of a hash of the texts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, texts)).encode()).digest()[:8], "big")


def choose_held_out() -> dict[str, list[list[str | int]]]:
    """The combinations to hold out of each kind, by a hash of the names.

    Of the colours those that must be painted in every style; of the counts and the sizes at most one of a thing; of the
    pairs more among the first `GATE` things, so that a trial with those has enough.
    """
    names = list(things())
    kinds: dict[str, list[list[str | int]]] = {kind: [] for kind in ("colour", "count", "pair", "size", "place")}
    for i, a in enumerate(names):
        for colour in COLOURS:
            plain = [colours()[a][style].get(colour, True) for style in STYLES]
            if not any(plain) and number("colour", colour, a) % 1000 < 125:
                kinds["colour"].append([colour, a])
        if number("count", a) % 100 < 60:
            kinds["count"].append([2 + number("which count", a) % 3, a])
        if number("size", a) % 100 < 60:
            kinds["size"].append([list(SIZES)[number("which size", a) % 2], a])
        kinds["place"] += [[place, a] for place in PLACES if number("place", place, a) % 1000 < 85]
        for j, b in enumerate(names[:i]):
            if number("pair", *sorted((a, b))) % 1000 < (150 if max(i, j) < GATE else 6):
                kinds["pair"].append([*sorted((a, b))])
    return {kind: sorted(entries, key=str) for kind, entries in kinds.items()}


@cache
def held_out() -> dict[str, frozenset[tuple[str | int, ...]]]:
    """The combinations of held_out_scenes.json by kind: (colour, thing), (count, thing), (thing, thing) sorted, …"""
    lists = json.loads(HELD_OUT.read_text("utf-8"))
    return {kind: frozenset(tuple(entry) for entry in entries) for kind, entries in lists.items()}


def combinations(description: Description) -> dict[str, list[tuple[str | int, ...]]]:
    """All combinations of a scene by kind, as they would be in the lists."""
    names = [part.thing for part in description.parts]
    return {
        "colour": [(part.colour, part.thing) for part in description.parts if part.colour],
        "count": [(description.count, names[0])] if description.count > 1 else [],
        "pair": [tuple(sorted(names))] if len(names) == 2 else [],
        "size": [(description.size, names[0])] if description.size else [],
        "place": [(description.place, name) for name in names if description.place],
    }


def held_out_kinds(description: Description) -> set[str]:
    """Of which kinds a scene has a combination that is held out."""
    lists = held_out()
    return {kind for kind, entries in combinations(description).items() if not lists[kind].isdisjoint(entries)}


# A scene from (seed, index)


def draw(
    seed: int,
    index: int,
    *,
    mixture: Mapping[str, float] = MIXTURE,
    names: Sequence[str] | None = None,
    jitter: float = 1.0,
) -> Scene:
    """Scene `index` of an endless sequence, without held-out combinations; the same on every machine.

    mixture  how often each kind is drawn
    names    of the things; all unless given
    jitter   how much places and sizes vary: 0 puts everything into the same slots
    """
    rng = np.random.default_rng((seed, index))
    names = names or list(things())
    kinds, shares = list(mixture), np.array(list(mixture.values()))
    kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    while True:
        description = _describe(rng, kind, names)
        if not held_out_kinds(description):
            return placed(description, rng, jitter)


def _describe(rng: np.random.Generator, kind: str, names: Sequence[str]) -> Description:
    style = STYLES[rng.integers(len(STYLES))]

    def part(chance: float, other: Part | None = None) -> Part:
        while (thing := names[rng.integers(len(names))]) == (other and other.thing):
            pass
        possible = [c for c in colours()[thing][style] if c != (other and other.colour)]
        coloured = rng.random() < chance and possible
        return Part(thing, possible[rng.integers(len(possible))] if coloured else None)

    def one(options: Mapping[str, object]) -> str:
        return list(options)[rng.integers(len(options))]

    if kind == "pair":
        chance = 1.0 if rng.random() < 0.5 else 0.25
        first = part(chance)
        return Description((first, part(chance, first)), style, relation=one(RELATIONS))
    if kind == "count":
        return Description((part(0.35),), style, count=int(rng.integers(2, 5)))
    if kind == "size":
        return Description((part(0.35),), style, size=one(SIZES))
    if kind == "place":
        return Description((part(0.35),), style, place=one(PLACES))
    return Description((part(1.0 if kind == "colour" else 0.0),), style)


SLOTS = {
    1: ((64, 64),),
    2: ((32, 64), (96, 64)),
    3: ((64, 32), (32, 96), (96, 96)),
    4: ((32, 32), (96, 32), (32, 96), (96, 96)),
}
LONE, SMALL, STANDING, TINY, HUGE = 86, 53, 66, 30, 121  # longer sides


def placed(description: Description, rng: np.random.Generator, jitter: float = 1.0) -> Scene:
    """A scene of that description. Raises ValueError for a colour that its thing has not in its style."""
    for part in description.parts:
        if part.colour and part.colour not in colours()[part.thing][description.style or ""]:
            raise ValueError(f"no {part.colour} {part.thing} in the style {description.style}")

    def box(x: float, y: float, side: float, shift: float = 3.0, grow: float = 3.0) -> Box:
        dx, dy = rng.uniform(-shift, shift, 2) * jitter
        return Box(x + dx, y + dy, round(side + rng.uniform(-grow, grow) * jitter))

    if description.relation:
        slots = SLOTS[2] if description.relation in ("left of", "right of", "and") else ((64, 32), (64, 96))
        backwards = description.relation in ("right of", "below")
        if description.relation == "and":
            backwards = bool(rng.random() < 0.5)
        boxes = [box(x, y, SMALL, 2, 2) for x, y in (slots[::-1] if backwards else slots)]
    elif description.place:
        boxes = [box(64, 64, STANDING, 8, 4)]  # the painter stands it on the ground
    elif description.size:
        tiny = description.size == "tiny"
        boxes = [box(64, 64, TINY, 14, 2) if tiny else box(64, 64, HUGE, 0.5, 2)]
    elif description.count > 1:
        boxes = [box(x, y, SMALL, 2, 2) for x, y in SLOTS[description.count]]
    else:
        boxes = [box(64, 64, LONE, 4, 6)]
    return Scene(description, tuple(boxes), int(rng.integers(2**32)))


def alone(concept: str, style: str, seed: int, index: int, jitter: float = 1.0) -> Scene:
    """A scene of one thing as it is, which need not be one of those that compose."""
    return placed(Description((Part(concept),), style), np.random.default_rng((seed, index)), jitter)


def held_out_scenes(
    kind: str, count: int, seed: int = 0, names: Sequence[str] | None = None, jitter: float = 1.0
) -> list[Scene]:
    """Scenes with a combination that is held out of that kind, and of no other kind: at most one of each combination.

    The combinations come in the order of a hash; the rest of each scene is drawn.
    """
    allowed = set(names or things())
    entries = [e for e in sorted(held_out()[kind], key=lambda e: number(seed, kind, *e)) if set(e[-1:]) <= allowed]
    if kind == "pair":
        entries = [e for e in entries if set(e) <= allowed]
    return [_with(kind, entry, np.random.default_rng((seed, number(*entry))), jitter) for entry in entries[:count]]


def _with(kind: str, entry: tuple[str | int, ...], rng: np.random.Generator, jitter: float) -> Scene:
    while True:
        name = str(entry[-1])
        base = _describe(rng, kind, [name] if kind != "pair" else [str(e) for e in entry])
        change: dict[str, object] = {}
        if kind == "colour":
            change["parts"] = (Part(name, str(entry[0])),)
        elif kind != "pair":
            change[kind] = entry[0]
        description = Description(**{**base.__dict__, **change})
        if held_out_kinds(description) == {kind}:
            return placed(description, rng, jitter)


def compositions(names: Sequence[str] | None = None) -> dict[str, list | dict]:
    """What a model of these things composes, for its card: the lists of `models info`, and the things' other names.

    Things are called by their concepts, and places backgrounds. `held_out` has the combinations that nothing is trained
    on, at least 200 of each kind if there are so many, with a style and an English prompt.
    """
    known = {name: thing for name, thing in things().items() if names is None or name in names}
    entries = []
    for kind in held_out():
        for scene in held_out_scenes(kind, 1000, names=list(known)):
            d = scene.description
            if kind == "pair":  # with no colour in them
                d = replace(d, parts=tuple(Part(part.thing) for part in d.parts))
            entry = {
                "kind": "background" if kind == "place" else kind,
                "prompt": english(d),
                "things": [known[part.thing].concept for part in d.parts],
                "style": d.style,
                "colour": d.parts[0].colour,
                "count": d.count if d.count > 1 else None,
                "relation": d.relation,
                "background": d.place,
                "size": d.size,
            }
            entries.append({key: value for key, value in entry.items() if value is not None})
    return {
        "things": [thing.concept for thing in known.values()],
        "names": {text: thing.concept for thing in known.values() for text in (thing.name, thing.plural)},
        "colours": list(COLOURS),
        "counts": list(COUNTS),
        "relations": list(RELATIONS),
        "backgrounds": list(WHERE),
        "sizes": list(SIZES),
        "held_out": entries,
    }


# Captions


def article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def english(description: Description) -> str:
    """The usual English caption: "a red cat left of a house, flat style"."""
    return _english(description, True) + (f", {description.style} style" if description.style else "")


def _english(d: Description, with_article: bool) -> str:
    def called(part: Part) -> str:
        thing = things()[part.thing]
        words = [d.size, part.colour, thing.plural if d.count > 1 else thing.name]
        text = " ".join(word for word in words if word)
        return article(text) if with_article and d.count == 1 else text

    first = called(d.parts[0])
    if d.relation:
        return f"{first} {d.relation} {called(d.parts[1])}"
    if d.count > 1:
        return f"{COUNTS[d.count][0]} {first}"
    return f"{first} {WHERE[d.place][0]}" if d.place else first


def chinese(description: Description) -> str:
    """The usual Chinese caption: "一只红色的猫在一座房子左边，扁平风格"."""
    style = f"，{CHINESE_STYLES[description.style]}风格" if description.style else ""
    return _chinese(description, True) + style


def _chinese(d: Description, with_measure: bool) -> str:
    def called(part: Part) -> str:
        thing = things()[part.thing]
        number = COUNTS[d.count][1] if d.count > 1 else "一"
        text = f"{number}{thing.measure}" if with_measure or d.count > 1 else ""
        for word in (d.size and SIZES[d.size], part.colour and CHINESE_COLOURS[part.colour]):
            text += f"{word}的" if word else ""
        return text + thing.chinese

    first = called(d.parts[0])
    if d.relation:
        return RELATIONS[d.relation].format(a=first, b=called(d.parts[1]))
    return f"{first}{WHERE[d.place][1]}" if d.place else first


def captions(description: Description) -> dict[str, float]:
    """{caption: how often it is drawn} of a scene, for training; together 1: 60 % English, 40 % Chinese."""
    weights: dict[str, float] = {}
    for language, share in ((_english, 0.6), (_chinese, 0.4)):
        for full, part in ((True, 0.7), (False, 0.3)):
            text = language(description, full)
            style = description.style or ""
            ends = {f", {style} style": 1.0} if language is _english else {f"，{CHINESE_STYLES[style]}风格": 1.0}
            for end, chance in {"": 1 - STYLED, **dict.fromkeys(ends, STYLED)}.items():
                weights[text + end] = weights.get(text + end, 0.0) + share * part * chance
    return weights


# Captions read back


@cache
def _words() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """({English name or plural: thing}, the same of plurals, {Chinese name: thing})"""
    singular = {thing.name: name for name, thing in things().items()}
    plurals = {thing.plural: name for name, thing in things().items()}
    return singular, plurals, {thing.chinese: name for name, thing in things().items()}


def parse(caption: str) -> Description | None:
    """The description of a caption in either language; None for a text that the grammar does not have."""
    text = " ".join(caption.strip().lower().split())
    chinese_text = re.search(r"[\u4e00-\u9fff]", text) is not None
    style = None
    for name in STYLES:
        for end in (f", {name} style", f"，{CHINESE_STYLES[name]}风格"):
            if text.endswith(end):
                style, text = name, text.removesuffix(end)
    return _parse_chinese(text, style) if chinese_text else _parse_english(text, style)


def _parse_english(text: str, style: str | None) -> Description | None:
    singular, plurals, _ = _words()

    def part(words: str, names: Mapping[str, str]) -> Part | None:
        first, _, rest = words.partition(" ")
        if first in COLOURS and rest in names:
            return Part(names[rest], first)
        return Part(names[words]) if words in names else None

    def noun(words: str) -> Part | None:
        return part(re.sub(r"^(a|an) ", "", words), singular)

    if whole := noun(text):
        return Description((whole,), style)
    for relation in RELATIONS:
        left, separator, right = text.partition(f" {relation} ")
        if separator and (a := noun(left)) and (b := noun(right)):
            return Description((a, b), style, relation=relation)
    for place, (end, _) in WHERE.items():
        if text.endswith(f" {end}") and (a := noun(text.removesuffix(f" {end}"))):
            return Description((a,), style, place=place)
    bare = re.sub(r"^(a|an) ", "", text)
    for size in SIZES:
        if bare.startswith(f"{size} ") and (a := part(bare.removeprefix(f"{size} "), singular)):
            return Description((a,), style, size=size)
    for count, (word, _) in COUNTS.items():
        if text.startswith(f"{word} ") and (a := part(text.removeprefix(f"{word} "), plurals)):
            return Description((a,), style, count=count)
    return None


def _parse_chinese(text: str, style: str | None) -> Description | None:
    names = {name.lower(): thing for name, thing in _words()[2].items()}
    counts = {word: count for count, (_, word) in COUNTS.items()} | {"一": 1}
    of_colour = {word: colour for colour, word in CHINESE_COLOURS.items()}
    of_size = {word: size for size, word in SIZES.items()}

    def noun(words: str) -> tuple[Part, int, str | None] | None:
        """(part, count, size) of a noun phrase."""
        for name, thing in names.items():
            if not words.endswith(name):
                continue
            before, measure = words.removesuffix(name), things()[thing].measure
            pattern = f"(?:([{''.join(counts)}]){measure})?(?:({'|'.join(of_size)})的)?(?:({'|'.join(of_colour)})的)?"
            if match := re.fullmatch(pattern, before):
                count, size, colour = match.groups()
                return Part(thing, of_colour.get(colour)), counts.get(count, 1), of_size.get(size)
        return None

    if whole := noun(text):
        return Description((whole[0],), style, count=whole[1], size=whole[2])
    for place, (_, end) in WHERE.items():
        if text.endswith(end) and (a := noun(text.removesuffix(end))):
            return Description((a[0],), style, place=place)
    for relation, form in RELATIONS.items():
        middle, end = form.removeprefix("{a}").split("{b}")
        for match in re.finditer(middle, text) if text.endswith(end) else ():
            a, b = noun(text[: match.start()]), noun(text[match.end() : len(text) - len(end)])
            if a and b:
                return Description((a[0], b[0]), style, relation=relation)
    return None


# Pictures


class Painter:
    """Paints scenes with the pictures of work/sprites.npz, or with others: {"style/thing": RGBA uint8 [h, w, 4]}."""

    def __init__(self, sprites: Path | Mapping[str, np.ndarray]) -> None:
        if isinstance(sprites, Path):
            with np.load(sprites) as file:
                sprites = {key: file[key] for key in file.files}
        self.sprites = sprites
        self.sprite = lru_cache(maxsize=4096)(self._sprite)
        self.scaled = lru_cache(maxsize=16384)(self._scaled)

    def _sprite(self, style: str, part: Part, half: bool = False) -> Image.Image:
        """A thing in its colour, premultiplied; `half` of the size is painted in a quarter of the time."""
        picture = self.sprites[f"{style}/{part.thing}"]
        if half:
            picture = np.asarray(Image.fromarray(picture).convert("RGBa").reduce(2).convert("RGBA"))
        if part.colour and not colours()[part.thing][style].get(part.colour, False):
            picture = painted(picture, part.colour)[0]
        return Image.fromarray(picture).convert("RGBa")

    def _scaled(self, style: str, part: Part, side: int) -> Image.Image:
        picture = self.sprite(style, part)
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0).convert("RGBA")

    def __call__(self, scene: Scene) -> Image.Image:
        """RGB, SIDE × SIDE."""
        d, ground = scene.description, None
        if d.place is None:
            picture = Image.new("RGB", (SIDE, SIDE), "white")
        else:
            picture, ground = background(d.place, np.random.default_rng(scene.seed))
        parts = d.parts if d.relation else d.parts * d.count
        for part, box in zip(parts, scene.boxes, strict=True):
            thing = self.scaled(d.style or "", part, box.side)
            left, top = box.x - thing.width / 2, box.y - thing.height / 2
            if ground is not None and d.place != "sky":
                top = ground - thing.height
                if d.place != "sea":
                    picture = _shadow(picture, box.x, ground, thing.width)
            picture.paste(thing, (round(left), round(top)), thing)
        return picture

    def array(self, scene: Scene) -> np.ndarray:
        """uint8 [3, SIDE, SIDE]"""
        return np.ascontiguousarray(np.asarray(self(scene)).transpose(2, 0, 1))


def _shadow(picture: Image.Image, x: float, y: float, width: float) -> Image.Image:
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).ellipse((x - width * 0.46, y - 4, x + width * 0.46, y + 4), 70)
    mask = mask.filter(ImageFilter.GaussianBlur(1.5))
    return Image.composite(Image.new("RGB", picture.size, (30, 30, 50)), picture, mask)


def contact_sheet(
    painter: Painter, seed: int = 0, columns: int = 10, names: Sequence[str] | None = None
) -> Image.Image:
    """Two rows of each kind, one of each place."""
    rows = []
    for kind in (*KINDS[:5], "place"):
        for row in range(4 if kind == "place" else 2):
            drawn = [draw(seed, row * columns + k, mixture={kind: 1.0}) for k in range(columns)]
            rows.append([painter(scene) for scene in drawn])
    sheet = Image.new("RGB", (columns * (SIDE + 2) + 2, len(rows) * (SIDE + 2) + 2), (128, 128, 128))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (2 + x * (SIDE + 2), 2 + y * (SIDE + 2)))
    return sheet


def main(work: Path, sheet: Path | None, lists: bool) -> None:
    if lists:
        chosen = choose_held_out()
        body = ",\n".join(
            f'"{kind}": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"
            for kind, entries in chosen.items()
        )
        HELD_OUT.write_text(f"{{\n{body}\n}}\n", "utf-8")
        print(", ".join(f"{kind} {len(entries)}" for kind, entries in chosen.items()), f"-> {HELD_OUT}")
    if sheet:
        contact_sheet(Painter(work / "sprites.npz")).save(sheet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet")
    parser.add_argument("--lists", action="store_true", help="write held_out_scenes.json anew")
    a = parser.parse_args()
    main(a.work, a.sheet, a.lists)
