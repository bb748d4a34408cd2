"""Prompt files: one prompt a line, as text or as JSON with options."""

from __future__ import annotations

import difflib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from diffgen.errors import InputError, UsageError
from diffgen.models.gate import open_file

from .words import MAX_BYTES

MAX_PROMPTS = 100_000  # that are held in memory; a batch reads any number, one by one

Types = Mapping[str, tuple[type, ...]]  # the options that a line may set: the types of their JSON values


@dataclass(frozen=True)
class Line:
    """A line of a prompt file: the prompt, its options (by name), and its place in the file."""

    prompt: str
    options: dict[str, Any] = field(default_factory=dict)
    where: str = ""  # "prompts.jsonl, line 3"


def read_lines(source: str, options: Types) -> list[Line]:
    """Read prompts from a UTF-8 file, or from stdin for "-", one a line; blank lines and # comments are skipped.

    A line that begins with {" is a JSON object with `prompt` and any of `options`; in a .jsonl file every line is.
    Raises InputError if the file cannot be read, and with the line's number for a line that is not UTF-8, longer than
    64 KiB, broken JSON, or has an unknown key or a value of the wrong type. Raises UsageError if there is no prompt.
    """
    name = "stdin" if source == "-" else source
    try:
        if source == "-":
            if sys.stdin is None:
                raise ValueError("it is closed")
            lines = _first_lines(iterate_lines(sys.stdin.buffer, name, options), name)
        else:
            piped = source.startswith(("/dev/fd/", "/dev/stdin"))  # <(COMMAND) of a shell, which does write
            with Path(source).open("rb") if piped else open_file(source) as file:
                lines = _first_lines(iterate_lines(file, name, options), name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read prompts from {name}: {reason}") from error
    if not lines:
        raise UsageError(f"{name} has no prompt", "write one prompt a line; lines that begin with # are skipped")
    return lines


def _first_lines(lines: Iterator[Line], name: str) -> list[Line]:
    """All of the lines. Raises UsageError for more than MAX_PROMPTS."""
    first = list(itertools.islice(lines, MAX_PROMPTS + 1))
    if len(first) > MAX_PROMPTS:
        raise UsageError(f"{name} has more than {MAX_PROMPTS} prompts", "diffgen batch reads any number of them")
    return first


def iterate_lines(file: BinaryIO, name: str, options: Types) -> Iterator[Line]:
    """Yield the prompts of an open file called `name`; format and errors are those of `read_lines`."""
    number = 0
    all_json = name.lower().endswith((".jsonl", ".ndjson"))
    while line := file.readline(MAX_BYTES + 2):
        number += 1
        where = f"{name}, line {number}"
        if len(line.rstrip(b"\r\n")) > MAX_BYTES:
            raise InputError(f"{where}: longer than {MAX_BYTES} bytes", "is it a text file?")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not valid UTF-8 (byte {error.start + 1})", "save it as UTF-8") from error
        if not text or text.startswith("#"):
            continue
        is_json = all_json or re.match(r'\{\s*"', text)
        yield _json_line(text, where, options) if is_json else Line(text, {}, where)


def _json_line(text: str, where: str, options: Types) -> Line:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise InputError(f"{where}: {twice[0]!r} appears twice")
        return dict(pairs)

    def no_number(word: str) -> None:
        raise InputError(f"{where}: {word} is not a number")

    try:
        values = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: broken JSON ({error})", 'one object a line, for example {"prompt": "a red apple", "seed": 7}'
        ) from error
    return line_of(values, where, options)


def line_of(values: Any, where: str, types: Types) -> Line:
    """The line that an object of JSON values stands for, checked. Raises InputError, with its place."""
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str) or not values["prompt"].strip():
        raise InputError(f"{where}: it has no text 'prompt'", 'for example {"prompt": "a red apple", "seed": 7}')
    options = {}
    for key, value in values.items():
        if key == "prompt":
            continue
        name = key.replace("-", "_")
        if name not in types:
            near = difflib.get_close_matches(name, ["prompt", *types], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: prompt, {', '.join(types)}"
            raise InputError(f"{where}: unknown key {key!r}", hint)
        if name in options:
            raise InputError(f"{where}: {name!r} appears twice")
        if type(value) not in types[name]:
            kinds = {str: "a text", int: "a whole number", float: "a number", list: "a list"}
            wanted = " or ".join(kinds[kind] for kind in types[name])
            raise InputError(f"{where}: {key!r} must be {wanted} (got {value!r})")
        if value == "" and name != "negative":
            raise InputError(f"{where}: {key!r} is empty", "give it a value, or leave it out")
        options[name] = value
    if not all(isinstance(name, str) for name in options.get("style", ())):
        raise InputError(f"{where}: 'style' must be a text or a list of texts")
    return Line(values["prompt"].strip(), options, where)
