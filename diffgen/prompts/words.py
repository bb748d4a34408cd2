"""Prompts: from files, checked, and compared with the words that a model was trained on. Imports no torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from diffgen.errors import InputError, UsageError
from diffgen.models.gate import MAX_TOKENIZER_FILE, read_json

from .syntax import plain_text

MAX_BYTES = 64 * 1024  # of one prompt, UTF-8


def check(prompt: str) -> str:
    """The prompt itself. Raises UsageError if it is empty, too long, or no Unicode text."""
    if not prompt.strip():
        raise UsageError("the prompt is empty", 'say what to show: diffgen generate "a red apple"')
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid UTF-8") from error
    if size > MAX_BYTES:
        raise UsageError(f"the prompt has {size} bytes; at most {MAX_BYTES} are read")
    return prompt


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(tokens, merges) of a CLIP tokenizer's folder: from tokenizer.json, else from vocab.json and merges.txt.

    Raises InputError for what is no byte-pair vocabulary.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        model = read_json(path, MAX_TOKENIZER_FILE).get("model")
        vocabulary, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    else:
        path = folder / "vocab.json"
        vocabulary = read_json(path, MAX_TOKENIZER_FILE)
        lines = (folder / "merges.txt").read_text("utf-8", "replace").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or not all(type(i) is int and 0 <= i < 2**31 for i in vocabulary.values()):
        raise InputError(f"{path}: no table of tokens and numbers")
    if not isinstance(merges, list):
        raise InputError(f"{path}: no list of merges")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise InputError(f"{folder}: a merge is not a pair of texts")
    return vocabulary, pairs


def words(text: str) -> list[str]:
    """The words and single digits, lower case, that CLIP's tokenizer looks up; no punctuation, no endings like 's."""
    text = unicodedata.normalize("NFC", text).lower()
    return [piece for piece in re.findall(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d", text) if piece[0] != "'"]


def caption_words(concepts: Iterable[str], styles: Iterable[str]) -> set[str]:
    """The words of the captions "a <concept>, <style> style": all that a model with such a card was trained on.

    Its vocabulary has more: the pieces that words were merged from ("man" of "snowman") have tokens of their own.
    """
    return {word for text in ("a", "an", "style", *concepts, *styles) for word in words(text)}


def known_words(said: Mapping[str, Any]) -> frozenset[str] | None:
    """The words that a model was trained on, by what its card says (`models.info.info`); None if it does not say.

    `words` lists them all; a card without it has `concepts` and `styles`, which stand in captions. Of scripts that
    write without spaces a word's characters are known too: the tokenizer reads them one by one.
    """
    if listed := said.get("words"):
        found = frozenset(word for text in listed for word in words(text))
        return found | {character for word in found for character in _pieces(word) if _is_wide(character)}
    if said.get("concepts"):
        return frozenset(caption_words(said["concepts"], said.get("styles") or ()))
    return None


def unknown_words(known: Container[str], text: str, syntax: str = "a1111") -> list[str]:
    """The words of a prompt that are not among the known ones, each once, in their order; its syntax is no word."""
    unknown: dict[str, None] = {}
    for word in words(plain_text(text, syntax)):
        if word in known:
            continue
        run = ""  # unknown characters that stand side by side
        for piece in [*_pieces(word), ""]:
            if _is_wide(piece) and piece not in known:
                run += piece
                continue
            found = [run, "" if piece in known else piece]
            unknown |= dict.fromkeys(part for part in found if part)
            run = ""
    return list(unknown)


def _pieces(word: str) -> list[str]:
    """The word, cut at the characters of scripts that write without spaces; each of those is a piece."""
    return re.findall("[\u2e80-\U0010ffff]|[^\u2e80-\U0010ffff]+", word)


def _is_wide(piece: str) -> bool:
    return len(piece) == 1 and piece >= "\u2e80"
