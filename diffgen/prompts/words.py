"""Check a prompt, and compare its words with those that a model was trained on."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Container, Iterable, Mapping
from typing import Any

from diffgen.errors import UsageError

from .syntax import plain_text

MAX_BYTES = 64 * 1024  # of one prompt, UTF-8


def check_prompt(prompt: str) -> str:
    """Return the prompt. Raises UsageError if it is empty, too long, or not valid Unicode."""
    if not prompt.strip():
        raise UsageError("the prompt is empty", 'say what to show: diffgen generate "a red apple"')
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid UTF-8") from error
    if size > MAX_BYTES:
        raise UsageError(f"the prompt has {size} bytes; the limit is {MAX_BYTES}")
    return prompt


def words(text: str) -> list[str]:
    """The words and single digits that CLIP's tokenizer looks up: lower case, no punctuation, no endings like 's."""
    text = unicodedata.normalize("NFC", text).lower()
    return [piece for piece in re.findall(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d", text) if piece[0] != "'"]


def caption_words(concepts: Iterable[str], styles: Iterable[str]) -> set[str]:
    """The words of the captions "a <concept>, <style> style", which a model with such a card was trained on.

    Its tokenizer's vocabulary is larger: the pieces of words ("man" in "snowman") have tokens of their own.
    """
    return {word for text in ("a", "an", "style", *concepts, *styles) for word in words(text)}


def known_words(card: Mapping[str, Any]) -> frozenset[str] | None:
    """The words that a model was trained on, from its card (`models.info.info`); None if the card lists none.

    The card's `words` are all of them; without `words`, its `concepts` and `styles` make up the captions. In scripts
    without spaces between words, each character of a known word is known too: the tokenizer reads them one by one.
    """
    if card.get("words"):
        known = frozenset(word for text in card["words"] for word in words(text))
        return known | {character for word in known for character in _pieces(word) if _is_wide(character)}
    if card.get("concepts"):
        return frozenset(caption_words(card["concepts"], card.get("styles") or ()))
    return None


def unknown_words(known: Container[str], text: str, syntax: str = "a1111") -> list[str]:
    """The words of a prompt that are not in `known`, each once, in order of appearance, without its syntax."""
    unknown: dict[str, None] = {}
    for word in words(plain_text(text, syntax)):
        if word in known:
            continue
        run = ""  # adjacent unknown characters
        for piece in [*_pieces(word), ""]:
            if _is_wide(piece) and piece not in known:
                run += piece
                continue
            parts = [run, "" if piece in known else piece]
            unknown |= dict.fromkeys(part for part in parts if part)
            run = ""
    return list(unknown)


IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "mice": "mouse",
             "teeth": "tooth", "geese": "goose", "knives": "knife", "wives": "wife"}  # fmt: skip


def nearest_words(known: Iterable[str], unknown: Iterable[str]) -> list[str]:
    """The known words that are unknown ones in another number, or spelt almost like them; at most one for each."""
    known = set(known)
    long = sorted(word for word in known if len(word) > 3)
    nearest: dict[str, None] = {}
    for word in unknown:
        other = next((form for form in other_numbers(word) if form in known), None)
        close = difflib.get_close_matches(word, long, n=1, cutoff=0.8) if other is None and len(word) > 3 else []
        nearest |= dict.fromkeys([other] if other is not None else close)
    return list(nearest)


def other_numbers(word: str) -> list[str]:
    """What the singular or the plural of an English word could be, the most probable first."""
    if word in IRREGULAR:
        return [IRREGULAR[word]]
    forms = []
    for ending, singulars in (("ies", ("y",)), ("ves", ("f", "fe")), ("es", ("", "e")), ("s", ("",))):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            forms += [word.removesuffix(ending) + singular for singular in singulars]
    return [*forms, f"{word}s", f"{word}es", *([f"{word[:-1]}ies"] if word.endswith("y") else [])]


def _pieces(word: str) -> list[str]:
    """Split a word so that each character of a script without spaces between words is a piece of its own."""
    return re.findall("[\u2e80-\U0010ffff]|[^\u2e80-\U0010ffff]+", word)


def _is_wide(piece: str) -> bool:
    return len(piece) == 1 and piece >= "\u2e80"
