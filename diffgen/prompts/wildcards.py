"""Wildcards: choices inside a prompt, made by the picture's seed.

    {a|b|c}              one of them; each may be empty, and may contain choices
    {3::a|b}             weights: a is three times as likely as b
    {2$$a|b|c}           two different ones, in a random order, joined by ", "; {1-2$$a|b|c} one or two
    {2$$ and $$a|b|c}    joined by " and "
    __animals__          a line of animals.txt in a wildcards folder; __zoo/birds__ of zoo/birds.txt there
    {2$$__animals__}     two different lines of it
    \\{ \\| \\_           the character itself

Files are UTF-8 with one choice a line. A line may begin with a weight (`3::`) and contain choices; blank lines and
lines that begin with # are skipped. A backslash and the character after it are kept for the prompt's grammar. All
choices of a picture come from `random.Random(seed).random()`, whose numbers are the same in every version of Python.

Source: the syntax of sd-dynamic-prompts as documented, without variables, globs and the listing of all combinations.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import platformdirs

from diffgen.errors import InputError, UsageError
from diffgen.models.gate import open_file

MAX_DEPTH = 20  # choices inside choices, and files inside files
MAX_CHOICES = 10_000  # for one prompt
MAX_TEXT = 64 * 1024  # characters of a prompt after its choices
MAX_WILDCARDS_FILE = 4 * 2**20  # bytes
MAX_LINES = 250_000  # of a wildcards file

_NAME = re.compile(r"__([^_\s{}|\\](?:[^\s{}|\\]{0,198}?[^_\s{}|\\])?)__")
_SAFE_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")
_COUNT = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?\$\$(?:((?:[^\\{}|$]|\\.){0,99})\$\$)?")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})::")


@dataclass(frozen=True)
class Choice:
    """A choice: the wildcard in the prompt, and the text that replaces it."""

    wildcard: str
    value: str


@dataclass(frozen=True)
class _File:
    source: str
    name: str


@dataclass(frozen=True)
class _Braces:
    """`low` to `high` of the options, joined with `joint`."""

    source: str
    low: int
    high: int
    joint: str
    options: _Options


_Text = tuple["str | _File | _Braces", ...]
_Options = tuple[tuple[float, _Text], ...]  # (weight, text) pairs


def default_folders() -> list[Path]:
    """The default wildcards folders that exist: ./wildcards, then the one in the user's configuration folder."""
    folders = (Path("wildcards"), platformdirs.user_config_path("diffgen") / "wildcards")
    return [folder for folder in folders if folder.is_dir()]


class Wildcards:
    """Makes the choices of prompts, with the files of some folders; of two files of one name, the first is read."""

    def __init__(self, folders: Sequence[str | Path] | None = None) -> None:
        """Use these folders (None: `default_folders()`). Raises InputError for a folder that does not exist."""
        self.folders = default_folders() if folders is None else [Path(folder) for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(f"there is no wildcards folder {str(folder)!r}")
        self._files: dict[str, _Options] = {}
        self._checked: set[str] = set()

    def check(self, text: str) -> None:
        """Check every choice that any seed can make.

        Raises UsageError (unclosed braces, fewer options than choices) and InputError (a file that does not exist, is
        not UTF-8, too large or empty, or includes itself).
        """
        self._check(_parse(text), ())

    def expand(self, prompt: str, seed: int, negative: str = "") -> tuple[str, str]:
        """Make the choices for a seed: (prompt, negative prompt). The prompt's choices come first.

        Raises as `check` does, and InputError if the choices exceed MAX_CHOICES or MAX_TEXT.
        """
        random = Random(seed)
        return self.choose(prompt, random)[0], self.choose(negative, random)[0]

    def choose(self, text: str, random: Random) -> tuple[str, list[Choice]]:
        """Make a text's choices: (text, choices), without the choices inside others. Raises as `expand` does."""
        parsed = _parse(text)
        self._check(parsed, ())
        return _Draw(self, random).choices(parsed)

    def possible(self, text: str) -> str:
        """All options that any seed can choose, concatenated. Raises as `check` does."""
        parsed = _parse(text)
        self._check(parsed, ())
        return "".join(self._possible(parsed, set()))

    def _possible(self, text: _Text, visited: set[str]) -> Iterator[str]:
        for piece in text:
            if isinstance(piece, str):
                yield piece
                continue
            if isinstance(piece, _File) and piece.name in visited:
                continue
            visited |= {piece.name} if isinstance(piece, _File) else set()
            for _, option in self.lines(piece.name) if isinstance(piece, _File) else piece.options:
                yield from self._possible(option, visited)
                yield " "

    def names(self) -> list[str]:
        """The names of the files, at most 10,000."""
        paths = (path.relative_to(folder) for folder in self.folders for path in folder.rglob("*.txt"))
        return sorted({path.with_suffix("").as_posix() for path in itertools.islice(paths, 10_000)})

    def lines(self, name: str) -> _Options:
        """The lines of a file as (weight, text) pairs. Raises InputError."""
        if name not in self._files:
            self._files[name] = _read(self._path(name), name)
        return self._files[name]

    def options(self, braces: _Braces) -> _Options:
        """The options of braces; a single file is replaced by its lines. Raises UsageError if there are too few."""
        options = braces.options
        if len(options) == 1 and len(options[0][1]) == 1 and isinstance(file := options[0][1][0], _File):
            options = self.lines(file.name)
        count = sum(weight > 0 for weight, _ in options)
        if braces.high > count:
            raise UsageError(f"{_short(braces.source)} asks for {braces.high} of {count} choices")
        return options

    def _path(self, name: str) -> Path:
        if not _SAFE_NAME.fullmatch(name):
            raise InputError(
                f"__{name}__ is not a wildcard's name: it may have letters, digits, _ - . and / for folders",
                f"write \\__{name}__ for plain text",
            )
        for folder in self.folders:
            path = folder / f"{name}.txt"
            if path.is_file():
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"__{name}__: {path} is a link to a file outside its folder")
                return path
        near = ", ".join(f"__{other}__" for other in difflib.get_close_matches(name, self.names(), n=3))
        searched = ", ".join(str(folder) for folder in self.folders) or "there is no folder ./wildcards"
        hint = f"did you mean {near}?" if near else f"write \\__{name}__ for plain text"
        raise InputError(f"there is no wildcards file for __{name}__ ({searched})", hint)

    def _check(self, text: _Text, parents: tuple[str, ...]) -> None:
        for piece in text:
            if isinstance(piece, _Braces):
                self.options(piece)
                for _, option in piece.options:
                    self._check(option, parents)
            elif isinstance(piece, _File) and piece.name not in self._checked:
                chain = (*parents, piece.name)
                if piece.name in parents:
                    circle = " > ".join(f"__{name}__" for name in chain[chain.index(piece.name) :])
                    raise InputError(f"wildcards include themselves: {circle}")
                if len(chain) > MAX_DEPTH:
                    raise InputError(f"wildcards are nested more than {MAX_DEPTH} deep at __{piece.name}__")
                for _, line in self.lines(piece.name):
                    self._check(line, chain)
                self._checked.add(piece.name)


class _Draw:
    """Draws the choices of one checked prompt."""

    def __init__(self, files: Wildcards, random: Random) -> None:
        self.files, self.random = files, random
        self.count = self.length = 0

    def choices(self, text: _Text) -> tuple[str, list[Choice]]:
        values = [self.value(piece) for piece in text]
        choices = [
            Choice(piece.source, value) for piece, value in zip(text, values, strict=True) if not isinstance(piece, str)
        ]
        return "".join(values), choices

    def value(self, piece: str | _File | _Braces) -> str:
        if isinstance(piece, str):
            self.length += len(piece)
            if self.length > MAX_TEXT:
                raise InputError(f"after its choices, the prompt is longer than {MAX_TEXT} characters")
            return piece
        if isinstance(piece, _File):
            return self.choices(self.draw(self.files.lines(piece.name), 1)[0])[0]
        number = piece.low
        if piece.high > piece.low:
            number += int(self.random.random() * (piece.high - piece.low + 1))
        drawn = self.draw(self.files.options(piece), number)
        self.length += len(piece.joint) * len(drawn)
        return piece.joint.join(self.choices(text)[0] for text in drawn)

    def draw(self, options: _Options, number: int) -> list[_Text]:
        """Draw `number` options without replacement, each with a probability in proportion to its weight."""
        self.count += number
        if self.count > MAX_CHOICES:
            raise InputError(f"the prompt has more than {MAX_CHOICES} choices")
        left = list(options)
        drawn = []
        for _ in range(number):
            point = self.random.random() * sum(weight for weight, _ in left)
            index = 0
            while index < len(left) - 1 and point >= left[index][0]:
                point -= left[index][0]
                index += 1
            drawn.append(left.pop(index)[1])
        return drawn


def _parse(text: str) -> _Text:
    """Parse a text. Raises UsageError for unclosed and unopened braces."""
    if not any(mark in text for mark in ("{", "}", "__")):
        return (text,) if text else ()
    parsed, end = _sequence(text, 0, 0)
    if end < len(text):
        raise UsageError(
            f"a brace is closed but never opened: {_short(text[max(0, end - 20) : end + 1])}",
            "write \\} for a brace as text",
        )
    return parsed


def _sequence(text: str, start: int, depth: int) -> tuple[_Text, int]:
    """Parse the text up to a closing brace or, inside braces, a bar: (pieces, index of the end)."""
    pieces: list[str | _File | _Braces] = []
    plain = i = start
    while i < len(text) and text[i] != "}" and not (depth and text[i] == "|"):
        piece: _File | _Braces | None = None
        end = i + (2 if text[i] == "\\" else 1)
        if text[i] == "{":
            piece, end = _braces(text, i, depth + 1)
        elif text[i] == "_" and (name := _NAME.match(text, i)):
            piece, end = _File(name[0], name[1]), name.end()
        if piece is not None:
            pieces += [text[plain:i], piece]
            plain = end
        i = min(end, len(text))
    pieces.append(text[plain:i])
    return tuple(piece for piece in pieces if piece != ""), i


def _braces(text: str, start: int, depth: int) -> tuple[_Braces, int]:
    """Parse the braces that open at `start`: (braces, index after them)."""
    if depth > MAX_DEPTH:
        raise UsageError(f"braces are nested more than {MAX_DEPTH} deep")
    count = _COUNT.match(text, start + 1)
    low, high, joint = (int(count[1]), int(count[2] or count[1]), count[3]) if count else (1, 1, None)
    end = count.end() if count else start + 1
    options = []
    while True:
        weight = _WEIGHT.match(text, end)
        option, end = _sequence(text, weight.end() if weight else end, depth)
        options.append((float(weight[1]) if weight else 1.0, option))
        if end >= len(text):
            raise UsageError(f"a brace is never closed: {_short(text[start:])}", "write \\{ for a brace as text")
        end += 1
        if text[end - 1] == "}":
            break
    if low > high:
        raise UsageError(f"{_short(text[start:end])} asks for {low} to {high} choices")
    return _Braces(text[start:end], low, high, ", " if joint is None else joint, tuple(options)), end


def _read(path: Path, name: str) -> _Options:
    """Read a wildcards file. Raises InputError."""
    try:
        with open_file(path) as file:
            data = file.read(MAX_WILDCARDS_FILE + 1)
        if len(data) > MAX_WILDCARDS_FILE:
            raise InputError(f"{path}: larger than {MAX_WILDCARDS_FILE} bytes")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 (byte {error.start + 1})", "save it as UTF-8") from error
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        raise InputError(f"{path}: {len(lines)} lines, at most {MAX_LINES} are read")
    options = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if len(line) > MAX_TEXT:
            raise InputError(f"{path}, line {number}: longer than {MAX_TEXT} characters")
        weight = _WEIGHT.match(line)
        try:
            options.append((float(weight[1]) if weight else 1.0, _parse(line[weight.end() if weight else 0 :].strip())))
        except UsageError as error:
            raise InputError(f"{path}, line {number}: {error.message}", error.hint) from error
    if not any(weight for weight, _ in options):
        raise InputError(f"{path}: there is no line to choose for __{name}__")
    return tuple(options)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
