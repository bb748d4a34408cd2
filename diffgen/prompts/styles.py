"""Styles: texts that are put around a prompt, from the user's styles.toml.

    [watercolour]
    prompt = "watercolour of {prompt}, soft light"     # without {prompt}: added at the end, after a comma
    negative = "photo"                                 # the same for the negative prompt

Styles are read from ./styles.toml and from styles.toml in the user's configuration folder; if both define a name, the
first file wins. Several styles are applied in order. Wildcards in a style are chosen together with those of the prompt.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from diffgen.errors import InputError, UsageError
from diffgen.models.gate import open_file

from .wildcards import MAX_TEXT

MAX_STYLES_FILE = 2**20  # bytes

PLACE = "{prompt}"


@dataclass(frozen=True)
class Style:
    """The texts around a prompt and around its negative prompt; "" for none."""

    name: str
    prompt: str = ""
    negative: str = ""


def default_files() -> list[Path]:
    """The default style files that exist: ./styles.toml, then the user's."""
    files = (Path("styles.toml"), platformdirs.user_config_path("diffgen") / "styles.toml")
    return [file for file in files if file.is_file()]


def read_styles(files: Sequence[str | Path] | None = None) -> dict[str, Style]:
    """Read the styles of some files (None: `default_files()`) by name. Raises InputError for a broken file."""
    styles: dict[str, Style] = {}
    for file in default_files() if files is None else files:
        for name, style in _read(Path(file)).items():
            styles.setdefault(name, style)
    return styles


def apply_styles(
    names: Iterable[str], prompt: str, negative: str = "", styles: Mapping[str, Style] | None = None
) -> tuple[str, str]:
    """Apply styles in order: (prompt, negative prompt). With `styles` None, read the user's styles.

    Raises UsageError for an unknown style, with similar names; InputError as `read_styles` does.
    """
    names = list(names)
    if names and styles is None:
        styles = read_styles()
    for name in names:
        assert styles is not None
        if name not in styles:
            near = difflib.get_close_matches(name, styles, n=3)
            available = ", ".join(sorted(styles)) or "none: write them in ./styles.toml"
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"available: {available}"
            raise UsageError(f"there is no style {name!r}", hint)
        prompt, negative = _put(styles[name].prompt, prompt), _put(styles[name].negative, negative)
    return prompt, negative


def _put(style: str, text: str) -> str:
    size = len(style) + len(text) * max(style.count(PLACE), 1)
    if size > MAX_TEXT:
        raise UsageError(f"with its styles, a prompt has about {size} characters, at most {MAX_TEXT}")
    if PLACE in style:
        return style.replace(PLACE, text)
    return ", ".join(part for part in (text.strip(), style) if part) if style else text


def _read(path: Path) -> dict[str, Style]:
    try:
        with open_file(path) as file:
            data = file.read(MAX_STYLES_FILE + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_STYLES_FILE:
        raise InputError(f"{path}: larger than {MAX_STYLES_FILE} bytes")
    try:
        tables = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOML's and UTF-8's errors are ValueErrors
        raise InputError(f"{path}: broken TOML ({error})") from error
    styles = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"{path}: {name!r} is not a style", f'write [{name}] and below it prompt = "…"')
        for key, value in table.items():
            if key not in ("prompt", "negative") or not isinstance(value, str):
                raise InputError(f"{path}: {key!r} of the style {name!r}", "a style has the texts prompt and negative")
        if not table:
            raise InputError(f"{path}: the style {name!r} is empty", "a style has the texts prompt and negative")
        styles[name] = Style(name, **table)
    return styles
