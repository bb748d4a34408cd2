"""diffgen prompt: show how a model reads a prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffgen.errors import UsageError
from diffgen.generation.checks import MAX_SEED, check_int
from diffgen.models.find import check, find
from diffgen.models.info import info
from diffgen.prompts import words as prompts
from diffgen.prompts.styles import apply_styles
from diffgen.prompts.syntax import check_syntax
from diffgen.prompts.wildcards import Wildcards

from .output import Debug, Json, Output, Quiet, table

EXAMPLES = """
Examples:

  diffgen prompt explain "a (red:1.3) apple, flat style"

  diffgen prompt explain "a {red|green} apple" --seed 7

  diffgen prompt explain "a very long prompt" --prompt-syntax plain
"""


def explain(
    text: Annotated[str, typer.Argument(help="The prompt.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME|FOLDER|FILE", help="Model with the tokenizer. \\[emoji]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the picture; it decides the choices.")] = 0,
    prompt_syntax: Annotated[
        str, typer.Option("--prompt-syntax", metavar="a1111|plain", help="Whether brackets and braces are syntax.")
    ] = "a1111",
    wildcards: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of wildcard files. \\[./wildcards and your own]")
    ] = None,
    style: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Style in styles.toml; may be repeated.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    from diffgen.prompts.explain import explain as explained
    from diffgen.prompts.tokens import ClipTokenizer

    say = Output("prompt explain", json, quiet)
    check_syntax(prompt_syntax)
    check_int("--seed", seed, 0, MAX_SEED)
    prompts.check_prompt(text)
    styled, _ = apply_styles(style or [], text)
    chosen = find(model)
    checked = check(chosen)
    tokenizer = next(
        (checked.components[name] for name in ("tokenizer", "tokenizer_2") if name in checked.components), None
    )
    if tokenizer is None:
        raise UsageError(f"{chosen.name} takes no prompt", "see: diffgen models list")
    encoder = checked.components[tokenizer.name.replace("tokenizer", "text_encoder")]
    length = check_int("max_position_embeddings", encoder.config.get("max_position_embeddings", 77), 3, 10**6)
    result = explained(
        styled,
        ClipTokenizer(tokenizer.folder, length, tokenizer.config),
        seed=seed,
        syntax=prompt_syntax,
        wildcards=None if wildcards is None else Wildcards([wildcards]),
        known=prompts.known_words(info(chosen)),
        weights="transformer" not in checked.components,
    )
    if result["unknown"]:
        say.warn(f"{chosen.name} never saw {', '.join(map(repr, result['unknown']))}")
    for note in result["notes"]:
        say.warn(note)
    say.result({"model": chosen.name, "family": checked.family, "styles": style or [], **result}, _lines(result))


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"prompt   {result['prompt']}"]
    for choice in result["choices"]:
        lines.append(f"choice   {choice['wildcard']} became {choice['value']!r} (seed {result['seed']})")
    count = len(result["chunks"])
    lines.append(f"tokens   {result['tokens']} in {count} chunk{'s' * (count != 1)} of at most {result['length'] - 2}")
    if result["cut"] and result["read"] == "chunks":
        lines.append(f"beyond   {result['cut']!r} is read in further chunks (--prompt-syntax plain would cut it off)")
    elif result["cut"]:
        lines.append(f"cut off  {result['cut']!r}")
    for number, chunk in enumerate(result["chunks"], 1):
        rows = [[str(token["id"]), f"{token['weight']:.4g}", token["token"]] for token in chunk]
        lines += [f"chunk {number}", *(f"  {row}" for row in table([["id", "weight", "token"], *rows]))]
    return lines
