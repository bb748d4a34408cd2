"""What the model is told about a picture: English and Chinese names and keywords, with and without the style.

By chance,
  32 %  the English name, one in three with its article        "red apple", "a red apple"
  12 %  another name, a keyword, or a pair of keywords         "fruit red"
  22 %  a Chinese name                                         "红苹果"
  34 %  a Chinese keyword                                      "熟"
and three in four say the style: English ones "…, flat style"; Chinese ones "…，扁平风格", a few "…，flat风格" or
"…, flat style". A concept that lacks one kind is called by its name instead. One caption in ten is left out
besides, for guidance: `diffusion.caption_dropout`.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from data import STYLES

CHINESE_STYLES = {"noto": "诺托风格", "flat": "扁平风格", "modern": "现代风格"}
KINDS = {"name": 0.32, "keyword": 0.12, "zh": 0.22, "zh_keyword": 0.34}
STYLED = 0.75


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


def mixture(concept: str, entry: dict, style: str) -> dict[str, float]:
    """{caption: how often it is drawn} of a picture, for training; together 1."""
    found: dict[str, float] = {}

    def add(text: str, weight: float) -> None:
        found[text] = found.get(text, 0.0) + weight

    choices, shares = texts(concept, entry), dict.fromkeys(KINDS, 0.0)
    for kind, share in KINDS.items():
        instead = "zh" if kind == "zh_keyword" and entry["zh"] else "name"
        shares[kind if choices[kind] else instead] += share
    for kind, share in shares.items():
        for name in choices[kind]:
            one = share / len(choices[kind])
            called = {name: one * 2 / 3, article(name): one / 3} if kind == "name" else {name: one}
            for text, weight in called.items():
                add(text, weight * (1 - STYLED))
                ways = styled(text, style, kind)
                parts = (4, 1, 1)[: len(ways)]
                for way, part in zip(ways, parts, strict=True):
                    add(way, weight * STYLED * part / sum(parts))
    return found


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
