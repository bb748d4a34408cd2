"""What the model is told about a picture: English and Chinese names and keywords, with and without the style.

One caption in ten is empty, for guidance. Of the others, by chance,
  55 %  the English name, one in three with its article        "red apple", "a red apple"
  13 %  another name, a keyword, or a pair of keywords         "fruit red"
  24 %  a Chinese name                                         "红苹果"
   8 %  a Chinese keyword
and three in four say the style: English ones "…, flat style"; Chinese ones "…，扁平风格", a few "…，flat风格" or
"…, flat style". A concept that lacks one kind is called by its name instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from data import STYLES

CHINESE_STYLES = {"noto": "诺托风格", "flat": "扁平风格", "modern": "现代风格"}
KINDS = {"name": 0.55, "keyword": 0.13, "zh": 0.24, "zh_keyword": 0.08}
EMPTY, STYLED = 0.10, 0.75


def names(work: Path) -> dict[str, dict]:
    """work/names.json, as `data.py` writes it."""
    return json.loads((work / "names.json").read_text("utf-8"))


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def texts(concept: str, entry: dict) -> dict[str, list[str]]:
    """What the concept is called, by kind; a kind that it lacks is an empty list."""
    return {
        "name": [concept],
        "keyword": entry["aliases"] + entry["keywords"],
        "zh": entry["zh"],
        "zh_keyword": entry["zh_keywords"],
    }


def styled(text: str, style: str, kind: str) -> list[str]:
    """The ways to add the style to a text of this kind, the usual one first."""
    english = f"{text}, {style} style"
    return [f"{text}，{CHINESE_STYLES[style]}", f"{text}，{style}风格", english] if kind[:2] == "zh" else [english]


def phrase(concept: str, entry: dict, style: str, draw: Random) -> str:
    """A caption of a picture, for training."""
    if draw.random() < EMPTY:
        return ""
    (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
    if not texts(concept, entry)[kind]:
        kind = "zh" if kind == "zh_keyword" and entry["zh"] else "name"
    text = draw.choice(texts(concept, entry)[kind])
    if kind == "name" and draw.random() < 1 / 3:
        text = article(text)
    if draw.random() >= STYLED:
        return text
    ways = styled(text, style, kind)
    return draw.choices(ways, (4, 1, 1)[: len(ways)])[0]


def prompt(concept: str, entry: dict, style: str, kind: str, draw: Random) -> str | None:
    """A trained caption of one kind that says the style, for measuring; None for a concept that lacks the kind."""
    choice = texts(concept, entry)[kind]
    return styled(draw.choice(choice), style, kind)[0] if choice else None


def every(table: dict[str, dict]) -> list[str]:
    """All captions that can come of the table, each once: for the tokenizer, and for the list of known words."""
    found = set()
    for concept, entry in table.items():
        for kind, choice in texts(concept, entry).items():
            for text in [*choice, *(article(t) for t in choice if kind == "name")]:
                found |= {text, *(way for style in STYLES for way in styled(text, style, kind))}
    return sorted(found)
