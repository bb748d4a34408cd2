"""AUTOMATIC1111's prompt grammar: what a prompt says, with the weight of each piece. Imports no torch.

    (text)       weight x 1.1           (text:1.3)   weight x 1.3, any number, no space needed
    [text]       weight / 1.1           BREAK        begins a new chunk
    \\( \\[ \\:    the character itself: a backslash takes the next character literally, whatever it is

Brackets nest, and their weights multiply. As in AUTOMATIC1111, an opening bracket that is never closed reaches to the
end of the prompt, and a closing one that nothing opened is text. Left out: AND (several prompts added up), and
[a:b:0.5] and [a|b] (prompts that change during sampling); `notes` says where a prompt looks like one of them.

Source: the docstring of `parse_prompt_attention` in AUTOMATIC1111's stable-diffusion-webui. Two things differ. BREAK is
also obeyed inside brackets. A backslash is only dropped where a character follows it, and also protects a colon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from diffgen.errors import UsageError

SYNTAXES = ("a1111", "plain")

MAX_DEPTH = 100  # open brackets of a kind
MAX_WEIGHT = 100.0  # in absolute value, after nesting

_UP, _DOWN = 1.1, 1 / 1.1
_NUMBER = re.compile(r":\s*([+-]?(?:\d{1,20}\.?\d{0,20}|\.\d{1,20}))\s*\)")
_ADAPTER = re.compile(r"<(lora|lyco|hypernet):([^<>:]*)(?::([^<>]*))?>")


class Part(NamedTuple):
    """A piece of a prompt, free of syntax, and its weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class _Token:
    """A character, or a piece of syntax: one of ( [ ) ] BREAK, or a number that closes a round bracket."""

    text: str
    kind: str  # "text", "(", "[", ")", "]", "BREAK", "number"
    number: float = 1.0


def check_syntax(name: str) -> str:
    """The name of a syntax. Raises UsageError."""
    if name not in SYNTAXES:
        raise UsageError(f"--prompt-syntax must be {' or '.join(SYNTAXES)} (got {name!r})")
    return name


def parse(text: str, syntax: str = "a1111") -> list[list[Part]]:
    """The parts of a prompt, one list for each section between BREAKs; neighbours of one weight are joined.

    `plain` takes the text literally: one section with one part of weight 1. At least one section comes back; an empty
    one has no parts. Raises UsageError: a weight beyond ±100, more than 100 brackets open, `<lora:…>` in the text.
    """
    if check_syntax(syntax) == "plain":
        return [[Part(text, 1.0)] if text else []]
    if adapter := _ADAPTER.search(text):
        kind, name, scale = adapter.groups()
        hint = f"--lora {name}.safetensors{f':{scale}' if scale else ''}" if kind != "hypernet" else "leave it out"
        raise UsageError(f"{adapter[0]} stands in the prompt; adapters are options here", f"take it out and use {hint}")
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
    """The prompt without its syntax: the text that is read, sections joined by a space."""
    sections = ("".join(part.text for part in section) for section in parse(text, syntax))
    return " ".join(section for section in sections if section)


def is_weighted(sections: list[list[Part]]) -> bool:
    """Does any part have a weight other than 1, or is there more than one section?"""
    return len(sections) > 1 or any(part.weight != 1 for section in sections for part in section)


def notes(text: str, syntax: str = "a1111") -> list[str]:
    """What of a prompt might be meant otherwise than it is read: unclosed brackets, and grammar that is left out."""
    if syntax == "plain":
        return []
    found = []
    _, unclosed = _weigh(_scan(text))
    if unclosed:
        found.append(
            f"{unclosed} bracket{'s' * (unclosed > 1)} never closed: the weight reaches to the end of the prompt; "
            "for a bracket as text write \\( or \\["
        )
    if any(_changes(inside) for inside in re.findall(r"\[([^\[\]()\\]{1,500})\]", text)):
        found.append("[a:b:0.5] and [a|b], prompts that change during sampling, are not known here: read as text")
    if re.search(r"(?<!\S)AND(?!\S)", text):
        found.append("AND, which adds up several prompts, is not known here: read as a word")
    return found


def _changes(inside: str) -> bool:
    """Do square brackets hold alternatives, or a time at the end?"""
    return "|" in inside or bool(re.fullmatch(r"[^:]*:[^:]*:\s*[\d.]+\s*", inside))


def escape(text: str) -> str:
    """The text with its syntax (wildcards' too) escaped: `parse(escape(text))` says just the text, in one section."""
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
    """Is there a letter, a digit or an underscore at that place?"""
    return 0 <= i < len(text) and (text[i].isalnum() or text[i] == "_")


def _weigh(tokens: list[_Token]) -> tuple[list[tuple[str | None, float]], int]:
    """(character or None for BREAK, its weight) one by one, and how many brackets were never closed.

    Brackets of different kinds need not nest in one another: each weighs what stands between it and its end.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for i in range(start, len(weights)):
            weights[i] *= factor
            if not abs(weights[i]) <= MAX_WEIGHT:
                raise UsageError(f"a weight of {weights[i]:g} in the prompt; from -100 to 100 are taken")

    for token in tokens:
        if token.kind in opened:
            opened[token.kind].append(len(texts))
            if len(opened[token.kind]) > MAX_DEPTH:
                raise UsageError(f"more than {MAX_DEPTH} brackets of the prompt are open at once")
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
    """The section without the white space that stands beside its BREAKs."""
    if section and left:
        section = [Part(section[0].text.lstrip(), section[0].weight), *section[1:]]
    if section and right:
        section = [*section[:-1], Part(section[-1].text.rstrip(), section[-1].weight)]
    return [part for part in section if part.text]
