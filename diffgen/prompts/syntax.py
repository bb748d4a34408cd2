"""AUTOMATIC1111's prompt grammar: the pieces of a prompt, each with its weight.

    (text)       weight x 1.1           (text:1.3)   weight x 1.3, any number, no space needed
    [text]       weight / 1.1           BREAK        begins a new chunk
    \\( \\[ \\:    the character itself: a backslash escapes any character after it

Brackets nest, and their weights multiply. As in AUTOMATIC1111, an unclosed bracket reaches to the end of the prompt,
and an unopened closing bracket is text. Not supported: AND (several prompts added up), and [a:b:0.5] and [a|b] (prompts
that change during sampling); `notes` warns about a prompt that looks like one of them.

Source: the docstring of `parse_prompt_attention` in AUTOMATIC1111's stable-diffusion-webui. Two things differ. BREAK
also works inside brackets. A backslash is only dropped if a character follows it, and it also escapes a colon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from diffgen.errors import UsageError

SYNTAXES = ("a1111", "plain")

MAX_BRACKETS = 100  # of one kind, open at once
MAX_WEIGHT = 100.0  # in absolute value, after nesting

_UP, _DOWN = 1.1, 1 / 1.1
_NUMBER = re.compile(r":\s*([+-]?(?:\d{1,20}\.?\d{0,20}|\.\d{1,20}))\s*\)")
_ADAPTER = re.compile(r"<(lora|lyco|hypernet):([^<>:]*)(?::([^<>]*))?>")


class Part(NamedTuple):
    """A piece of a prompt without syntax, and its weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class _Token:
    """A character or a piece of syntax: one of ( [ ) ] BREAK, or a number that closes a round bracket."""

    text: str
    kind: str  # "text", "(", "[", ")", "]", "BREAK", "number"
    number: float = 1.0


def check_syntax(name: str) -> str:
    """Return the name of a syntax. Raises UsageError for an unknown one."""
    if name not in SYNTAXES:
        raise UsageError(f"--prompt-syntax must be {' or '.join(SYNTAXES)} (got {name!r})")
    return name


def parse(text: str, syntax: str = "a1111") -> list[list[Part]]:
    """Parse a prompt into one list of parts for each section between BREAKs; adjacent parts of equal weight are joined.

    With the syntax `plain` the text is literal: one section with one part of weight 1. There is always at least one
    section; an empty section has no parts. Raises UsageError for a weight beyond ±100, more than 100 open brackets, or
    `<lora:…>` in the text.
    """
    if check_syntax(syntax) == "plain":
        return [[Part(text, 1.0)] if text else []]
    if adapter := _ADAPTER.search(text):
        kind, name, scale = adapter.groups()
        hint = f"--lora {name}.safetensors{f':{scale}' if scale else ''}" if kind != "hypernet" else "leave it out"
        raise UsageError(f"the prompt contains {adapter[0]}; adapters are options here", f"take it out and use {hint}")
    pieces, _ = _weigh(_scan(text))
    sections: list[list[Part]] = [[]]
    for piece, weight in pieces:
        if piece is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1].weight == weight:
            sections[-1][-1] = Part(sections[-1][-1].text + piece, weight)
        else:
            sections[-1].append(Part(piece, weight))
    return [_trim(section, i > 0, i < len(sections) - 1) for i, section in enumerate(sections)]


def plain_text(text: str, syntax: str = "a1111") -> str:
    """The text of a prompt without its syntax; sections are joined by a space."""
    sections = ("".join(part.text for part in section) for section in parse(text, syntax))
    return " ".join(section for section in sections if section)


def is_weighted(sections: list[list[Part]]) -> bool:
    """Is there a part with a weight other than 1, or more than one section?"""
    return len(sections) > 1 or any(part.weight != 1 for section in sections for part in section)


def notes(text: str, syntax: str = "a1111") -> list[str]:
    """Warnings about what a prompt may mean but does not: unclosed brackets, and grammar that is not supported."""
    if syntax == "plain":
        return []
    warnings = []
    _, unclosed = _weigh(_scan(text))
    if unclosed:
        warnings.append(
            f"{unclosed} bracket{'s' * (unclosed > 1)} never closed: the weight reaches to the end of the prompt; "
            "write \\( or \\[ for a bracket as text"
        )
    if any(_changes(inside) for inside in re.findall(r"\[([^\[\]()\\]{1,500})\]", text)):
        warnings.append("[a:b:0.5] and [a|b], prompts that change during sampling, are not supported: read as text")
    if re.search(r"(?<!\S)AND(?!\S)", text):
        warnings.append("AND, which adds up several prompts, is not supported: read as a word")
    return warnings


def _changes(inside: str) -> bool:
    """Does the text inside square brackets have alternatives, or a time at its end?"""
    return "|" in inside or bool(re.fullmatch(r"[^:]*:[^:]*:\s*[\d.]+\s*", inside))


def escape(text: str) -> str:
    """Escape all syntax in a text, wildcards' too: `parse(escape(text))` is the text itself, in one section."""
    text = re.sub(r"([\\()\[\]{}|])", r"\\\1", text)
    return re.sub(r"\bBREAK\b", r"\\BREAK", text).replace("__", r"\__")


def _scan(text: str) -> list[_Token]:
    tokens = []
    i = 0
    while i < len(text):
        c = text[i]
        if c == "\\" and i + 1 < len(text):
            tokens.append(_Token(text[i + 1], "text"))
            i += 2
        elif c in "()[]":
            tokens.append(_Token(c, c))
            i += 1
        elif c == ":" and (closing := _NUMBER.match(text, i)):
            tokens.append(_Token(closing[0], "number", float(closing[1])))
            i = closing.end()
        elif text.startswith("BREAK", i) and not _joins(text, i - 1) and not _joins(text, i + 5):
            tokens.append(_Token("BREAK", "BREAK"))
            i += 5
        else:
            tokens.append(_Token(c, "text"))
            i += 1
    return tokens


def _joins(text: str, i: int) -> bool:
    """Is there a letter, a digit or an underscore at that index?"""
    return 0 <= i < len(text) and (text[i].isalnum() or text[i] == "_")


def _weigh(tokens: list[_Token]) -> tuple[list[tuple[str | None, float]], int]:
    """(character or None for BREAK, its weight) for each character, and the number of unclosed brackets.

    Brackets of different kinds need not nest: each multiplies the weights between its start and its end.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= factor
            if not abs(weights[i]) <= MAX_WEIGHT:
                raise UsageError(f"the prompt has a weight of {weights[i]:g}; weights are from -100 to 100")

    for token in tokens:
        if token.kind in opened:
            opened[token.kind].append(len(texts))
            if len(opened[token.kind]) > MAX_BRACKETS:
                raise UsageError(f"the prompt has more than {MAX_BRACKETS} open brackets at once")
        elif token.kind == "number" and opened["("]:
            multiply(opened["("].pop(), token.number)
        elif token.kind == ")" and opened["("]:
            multiply(opened["("].pop(), _UP)
        elif token.kind == "]" and opened["["]:
            multiply(opened["["].pop(), _DOWN)
        else:
            characters = [None] if token.kind == "BREAK" else list(token.text)
            texts += characters
            weights += [1.0] * len(characters)
    unclosed = [(start, _UP) for start in opened["("]] + [(start, _DOWN) for start in opened["["]]
    for start, factor in unclosed:
        multiply(start, factor)
    return list(zip(texts, weights, strict=True)), len(unclosed)


def _trim(section: list[Part], left: bool, right: bool) -> list[Part]:
    """Remove the white space next to a section's BREAKs."""
    if section and left:
        section = [Part(section[0].text.lstrip(), section[0].weight), *section[1:]]
    if section and right:
        section = [*section[:-1], Part(section[-1].text.rstrip(), section[-1].weight)]
    return [part for part in section if part.text]
