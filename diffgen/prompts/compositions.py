"""Compare a prompt with what a model composes, as its card lists it (`compositions`).

    prompt := thing | size thing | count things | thing relation thing | thing place      thing := [colour] name

There are no comments on a prompt that asks for one thing and no more: it can be a keyword, or in another language.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
COUNTS = {word: number for number, word in enumerate(NUMBERS, 1)} | {str(number): number for number in range(2, 13)}
COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "grey", "gray", "brown"),
    *("gold", "golden", "silver", "beige", "cyan", "turquoise", "magenta", "violet"),
)
SIZES = ("tiny", "small", "little", "big", "large", "huge", "giant", "enormous")
RELATIONS = (  # the longer ones first
    *("to the left of", "to the right of", "on the left of", "on the right of", "left of", "right of"),
    *("on top of", "in front of", "next to", "close to", "above", "below", "under", "over", "beside", "behind"),
    *("inside", "between", "near", "and", "with"),
)
PLACE = re.compile(r" (?:in|on|at) (?:the |a |an )?([a-z]+)$")
ARTICLE = re.compile(r"^(?:a|an|the) ")


@dataclass
class _Phrase:
    """The parts of a prompt that were recognised."""

    things: list[str] = field(default_factory=list)
    named: dict[str, list[str]] = field(default_factory=dict)  # kind: its words

    def add(self, kind: str, word: str) -> None:
        self.named.setdefault(kind, []).append(word)


def composition_notes(card: Mapping[str, Any], text: str) -> list[str]:
    """What a plain English prompt asks for beyond what the model composes, each with the nearest that it knows.

    `card` has the keys of `models.info`. Its `compositions` has lists of texts `things`, `colours`, `relations`,
    `sizes` and `backgrounds`, whole numbers `counts`, and `names`, an object {singular or plural: thing}. A model
    without compositions, or with no things in them, draws one of its concepts: a note names the nearest.
    """
    compositions = card.get("compositions")
    if not compositions or not compositions.get("things"):
        return _beyond(card, text)
    text = " ".join(text.lower().split())
    for style in card.get("styles") or ():
        text = text.removesuffix(f", {style} style")
    text = ARTICLE.sub("", text)
    names = {thing: thing for thing in compositions["things"]} | compositions.get("names", {})
    phrase = _read(text, names)
    if not phrase.named or text in (card.get("concepts") or ()):
        return []
    comments: list[str | None] = [_thing(thing, names) for thing in phrase.things if thing not in names]
    for kind, words in phrase.named.items():
        known = compositions.get(f"{kind}s", [])
        comments += [_count(word, known) if kind == "count" else _word(kind, word, known) for word in words]
    several = sorted(phrase.named.keys() - {"colour"}) + ["relation"] * (len(phrase.named.get("relation", ())) - 1)
    if len(several) > 1:
        comments.append(f"it composes with one count, relation, size or background at a time, not {len(several)}")
    return [comment for comment in comments if comment]


def _beyond(card: Mapping[str, Any], text: str) -> list[str]:
    """The note on a prompt that has more than one of the concepts of a model that composes nothing."""
    names = {str(concept): str(concept) for concept in card.get("concepts") or ()}
    plain = " ".join(text.lower().split())
    for style in card.get("styles") or ():
        plain = plain.removesuffix(f", {style} style")
    plain = ARTICLE.sub("", plain)
    if not names or " " not in plain or not plain.isascii() or plain in names:
        return []
    inside = [name for name in names if f" {name} " in f" {plain} "]
    if not inside and not _read(plain, names).named:
        return []  # it can be a keyword
    nearest = f"; it knows {max(inside, key=len)!r}" if inside else ""
    return [f"it draws one thing at a time and may not show all of {plain!r}{nearest}"]


def _read(text: str, names: Mapping[str, str]) -> _Phrase:
    phrase = _Phrase()
    if text in names:
        phrase.things.append(text)
        return phrase
    place = PLACE.search(text)
    if place:
        phrase.add("background", place[1])
        text = text[: place.start()]
    pieces = re.split(f" ({'|'.join(RELATIONS)}) ", text)
    for piece in pieces[::2]:
        _noun(piece, phrase, names)
    for relation in pieces[1::2]:
        phrase.add("relation", relation)
    return phrase


def _noun(text: str, phrase: _Phrase, names: Mapping[str, str]) -> None:
    """Read [count] [size] [colour] thing."""
    text = ARTICLE.sub("", text)
    for kind, words in (("count", COUNTS), ("size", SIZES), ("colour", COLOURS)):
        first, _, rest = text.partition(" ")
        if text not in names and rest and first in words:
            phrase.add(kind, first)
            text = rest
    phrase.things.append(text)


def _nearest(thing: str, known: Iterable[str]) -> str:
    within = [name for name in known if f" {name} " in f" {thing} "]
    near = [max(within, key=len)] if within else difflib.get_close_matches(thing, list(known), n=1, cutoff=0.6)
    return f"; the nearest that it knows is {near[0]!r}" if near else ""


def _thing(thing: str, names: Mapping[str, str]) -> str:
    return f"it does not compose {thing!r}{_nearest(thing, names)}"


def _word(kind: str, word: str, known: Sequence[str]) -> str | None:
    if word in known:
        return None
    if not known:
        return f"it knows no {kind}s (got {word!r})"
    return f"it does not know the {kind} {word!r}: it knows {', '.join(known)}"


def _count(word: str, counts: Sequence[int]) -> str | None:
    number = COUNTS[word]
    if number in (1, *counts):
        return None
    nearest = min(counts, key=lambda count: abs(count - number), default=1)
    return f"it does not count {word!r}; the nearest number is {nearest}"
