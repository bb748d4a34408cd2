"""Prompts: from files, checked, and compared with the words that a model was trained on. Imports no torch."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Container, Iterable
from pathlib import Path
from typing import BinaryIO

from diffgen.errors import InputError, UsageError
from diffgen.models.gate import MAX_TOKENIZER_FILE, read_json

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


def read(source: str) -> list[str]:
    """The prompts in a file, or in stdin for "-", one a line, UTF-8; blank lines and # comments are skipped.

    Raises InputError (cannot be read, not UTF-8, a line over 64 KiB: with its number), UsageError (no prompt in it).
    """
    name = "stdin" if source == "-" else source
    try:
        if source == "-":
            if sys.stdin is None:
                raise ValueError("it is closed")
            prompts = _lines(sys.stdin.buffer, name)
        else:
            with Path(source).open("rb") as file:
                prompts = _lines(file, name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read prompts from {name}: {reason}") from error
    if not prompts:
        raise UsageError(
            f"there is no prompt in {name}", "write one prompt a line; lines that begin with # are skipped"
        )
    return prompts


def _lines(file: BinaryIO, name: str) -> list[str]:
    prompts = []
    number = 0
    while line := file.readline(MAX_BYTES + 2):
        number += 1
        if len(line.rstrip(b"\r\n")) > MAX_BYTES:
            raise InputError(f"{name}, line {number}: longer than {MAX_BYTES} bytes", "is it a text file?")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: not valid UTF-8 (byte {error.start + 1})", "save it as UTF-8"
            ) from error
        if re.match(r'\{\s*"', text):
            raise InputError(
                f"{name}, line {number}: looks like JSON, and this version reads plain prompts, one a line"
            )
        if text and not text.startswith("#"):
            prompts.append(text)
    return prompts


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


def unknown_words(known: Container[str], text: str) -> list[str]:
    """The words of a text that are not among the known ones, each once, in their order."""
    return [word for word in dict.fromkeys(words(text)) if word not in known]
