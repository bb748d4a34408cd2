"""Explain a prompt: its choices, weights, tokens and chunks, as a model reads them."""

from __future__ import annotations

from collections.abc import Container
from random import Random
from typing import Any

from .syntax import notes, parse, plain_text
from .tokens import ClipTokenizer, chunks
from .wildcards import Choice, Wildcards
from .words import unknown_words


def explain(
    text: str,
    tokenizer: ClipTokenizer,
    *,
    seed: int = 0,
    syntax: str = "a1111",
    wildcards: Wildcards | None = None,
    known: Container[str] | None = None,
    weights: bool = True,
) -> dict[str, Any]:
    """Explain, as JSON values, how a model with this tokenizer reads a prompt.

    `seed` decides the choices, with the files of `wildcards` (None: the default folders). `known` has the words that
    the model was trained on (None: no information). `weights` is False for a family that reads one chunk of plain text
    (Stable Diffusion 3, Flux). With the syntax "plain", no character of the text is syntax.

    template  the input text                  prompt   the text after the choices
    seed, syntax                              choices  [{wildcard, value}] in order
    text      the prompt without syntax       parts    [{text, weight, section}]
    tokens    their total number              length   tokens that the model reads at once, start and end included
    chunks    [[{id, token, weight}]] without start, end and padding
    cut       the text beyond the first chunk; "" if there is none
    read      "chunks" (the model reads everything) or "one chunk" (it does not read `cut`)
    unknown   words that the model was not trained on; None if its card does not list them
    notes     warnings of `syntax.notes`

    Raises UsageError and InputError, as `syntax.parse` and `Wildcards.expand` do.
    """
    choices: list[Choice] = []
    prompt = text
    if syntax != "plain":
        prompt, choices = (Wildcards() if wildcards is None else wildcards).choose(text, Random(seed))
    sections = parse(prompt, syntax)
    plain = plain_text(prompt, syntax)
    room = tokenizer.length - 2
    ids = tokenizer.ids(plain)
    in_chunks = weights and syntax != "plain"
    read = chunks(sections, tokenizer.ids, room) if in_chunks else [[(number, 1.0) for number in ids[:room]]]
    return {
        "template": text,
        "prompt": prompt,
        "seed": seed,
        "syntax": syntax,
        "choices": [{"wildcard": choice.wildcard, "value": choice.value} for choice in choices],
        "text": plain,
        "parts": [
            {"text": part.text, "weight": round(part.weight, 6), "section": number}
            for number, section in enumerate(sections)
            for part in section
        ],
        "tokens": sum(map(len, read)) if in_chunks else len(ids),
        "length": tokenizer.length,
        "chunks": [
            [{"id": number, "token": tokenizer.token(number), "weight": round(weight, 6)} for number, weight in chunk]
            for chunk in read
        ],
        "cut": tokenizer.text(ids[room:]),
        "read": "chunks" if in_chunks else "one chunk",
        "unknown": None if known is None else unknown_words(known, prompt, syntax),
        "notes": notes(prompt, syntax),
    }
