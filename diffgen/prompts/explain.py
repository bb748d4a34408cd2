"""What becomes of a prompt before a picture is made of it: choices, weights, tokens, chunks. Imports no torch."""

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
    """What a model with this tokenizer reads of a prompt, as JSON values.

    `seed` makes the choices, from the files of `wildcards` (None: the default folders). `known` are the words that the
    model was trained on, None if that is not known. `weights` False stands for a family that reads the text alone, in
    one chunk (Stable Diffusion 3, Flux). With the syntax "plain" nothing in the text has a meaning of its own.

    template  the text as it was given        prompt   with its choices made
    seed, syntax                              choices  [{wildcard, value}] in their order
    text      without any syntax              parts    [{text, weight, section}]
    tokens    how many, in all                length   how many the model reads at once, start and end included
    chunks    [[{id, token, weight}]]: start, end and padding are not listed
    cut       what a model would not read if it read one chunk only, as it does with the syntax "plain"; "" if nothing
    read      what of it is read: "chunks" (all of it) or "one chunk" (`cut` is dropped)
    unknown   words that the model was not trained on; None if that is not known
    notes     what might be meant otherwise than it is read

    Raises UsageError and InputError as `prompt_syntax.parse` and `Wildcards.expand` do.
    """
    choices: list[Choice] = []
    prompt = text
    if syntax != "plain":
        prompt, choices = (Wildcards() if wildcards is None else wildcards).choose(text, Random(seed))
    sections = parse(prompt, syntax)
    plain = plain_text(prompt, syntax)
    room = tokenizer.length - 2
    whole = tokenizer.ids(plain)
    in_chunks = weights and syntax != "plain"
    found = chunks(sections, tokenizer.ids, room) if in_chunks else [[(number, 1.0) for number in whole[:room]]]
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
        "tokens": sum(map(len, found)) if in_chunks else len(whole),
        "length": tokenizer.length,
        "chunks": [
            [{"id": number, "token": tokenizer.token(number), "weight": round(weight, 6)} for number, weight in chunk]
            for chunk in found
        ],
        "cut": tokenizer.text(whole[room:]),
        "read": "chunks" if in_chunks else "one chunk",
        "unknown": None if known is None else unknown_words(known, prompt, syntax),
        "notes": notes(prompt, syntax),
    }
