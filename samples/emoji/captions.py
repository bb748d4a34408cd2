"""The captions of a picture: English and Chinese names and keywords, with and without the style.

A caption is drawn at random:
  32 %  the English name, one in three with its article        "red apple", "a red apple"
  12 %  another name, a keyword, or a pair of keywords         "fruit red"
  22 %  a Chinese name                                         "红苹果"
  34 %  a Chinese keyword                                      "熟"
Three in four name the style: English ones as "…, flat style", Chinese ones as "…，扁平风格", a few as "…，flat风格" or
"…, flat style". A concept that lacks one kind uses its name instead. For guidance, one caption in ten is dropped
(`diffusion.caption_dropout`).
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
    """The table of names that `data.py` wrote: work/names.json."""
    return json.loads((work / "names.json").read_text("utf-8"))


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def texts(concept: str, entry: dict) -> dict[str, list[str]]:
    """The concept's names by kind; a kind that it lacks is an empty list."""
    return {
        "name": [concept],
        "keyword": entry["aliases"] + entry["keywords"],
        "zh": entry["zh"],
        "zh_keyword": entry["zh_keywords"],
    }


def styled(text: str, style: str, kind: str) -> list[str]:
    """A text of this kind with the style added in each way, the most frequent first."""
    english = f"{text}, {style} style"
    return [f"{text}，{CHINESE_STYLES[style]}", f"{text}，{style}风格", english] if kind[:2] == "zh" else [english]


def mixture(concept: str, entry: dict, style: str) -> dict[str, float]:
    """{caption: probability} of a picture, for training."""
    captions: dict[str, float] = {}

    def add(text: str, weight: float) -> None:
        captions[text] = captions.get(text, 0.0) + weight

    choices, shares = texts(concept, entry), dict.fromkeys(KINDS, 0.0)
    for kind, share in KINDS.items():
        substitute = "zh" if kind == "zh_keyword" and entry["zh"] else "name"
        shares[kind if choices[kind] else substitute] += share
    for kind, share in shares.items():
        for name in choices[kind]:
            each = share / len(choices[kind])
            forms = {name: each * 2 / 3, article(name): each / 3} if kind == "name" else {name: each}
            for text, weight in forms.items():
                add(text, weight * (1 - STYLED))
                forms_with_style = styled(text, style, kind)
                parts = (4, 1, 1)[: len(forms_with_style)]
                for form, part in zip(forms_with_style, parts, strict=True):
                    add(form, weight * STYLED * part / sum(parts))
    return captions


def prompt(concept: str, entry: dict, style: str, kind: str, draw: Random) -> str | None:
    """A training caption of one kind with the style, for measuring; None if the concept lacks the kind."""
    choice = texts(concept, entry)[kind]
    return styled(draw.choice(choice), style, kind)[0] if choice else None


def every(table: dict[str, dict]) -> list[str]:
    """All captions of the table, each once: for the tokenizer and for the list of words."""
    captions = set()
    for concept, entry in table.items():
        for kind, choice in texts(concept, entry).items():
            for text in [*choice, *(article(t) for t in choice if kind == "name")]:
                captions |= {text, *(form for style in STYLES for form in styled(text, style, kind))}
    return sorted(captions)
