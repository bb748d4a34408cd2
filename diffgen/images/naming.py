"""Where pictures go: `-o`, checked before any work, and file names that are safe for every prompt."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from diffgen.errors import CannotWrite, UsageError

from .publish import Exists, cannot_write, publish

DEFAULT_NAME = "{index:06}-{seed}-{prompt}.png"
DEFAULT = f"outputs/{DEFAULT_NAME}"
MAX_COMPONENT = 120  # bytes of one folder or file name, UTF-8
SLUG_BYTES = (80, 60, 40, 20, 10)  # of the texts in a name: the longest with which it fits

NUMBER = re.compile(r"0?\d{0,2}")  # {index}, {index:6}, {index:06}
LENGTH = re.compile(r"\d{0,2}")  # {prompt}, {prompt:40}: at most so many letters
DATE = re.compile(r"(%[YmdHMSjy]|[-_. ])*")  # {date}, {date:%Y%m%d}
FIELDS = {
    **dict.fromkeys(("index", "seed", "steps"), NUMBER),
    **dict.fromkeys(("prompt", "model", "scheduler"), LENGTH),
    "date": DATE,
}

# Names that Windows takes for devices, whatever follows the first dot.
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789")}
SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


def slug(text: str, limit: int = SLUG_BYTES[0]) -> str:
    """A piece of a file name: letters and digits of any script, `.`, `_`, `-`; at most `limit` bytes of UTF-8.

    Everything else becomes one hyphen; no dot, hyphen or underscore stands at either end. Never empty.
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c if c in "._" or unicodedata.category(c)[0] in "LNM" else "-" for c in text)
    text = re.sub(r"\.{2,}", ".", re.sub(r"-+", "-", text)).strip("._-")
    text = text.encode()[:limit].decode(errors="ignore").strip("._-")
    return text or "untitled"


class Outputs:
    """The files that one command writes. Built before any work, it refuses what could not be written later.

    `out` is one of
      - None: `outputs/{index:06}-{seed}-{prompt}.png`;
      - FOLDER/ or an existing folder: the same name in there;
      - a template with fields {index} {seed} {prompt} {model} {scheduler} {steps} {date}, each with an optional width
        (`{index:06}`), length (`{prompt:40}`) or format (`{date:%Y%m%d}`); fields may also name folders, but {index};
      - FILE.png; with `count` > 1 pictures FILE-1.png, FILE-2.png, …

    {index} is one more than the highest number in the folder. A template without {index} whose name is taken gets
    -1, -2, …; with `overwrite` it replaces the file, unless this object wrote it. Nothing is created before `write`.

    Raises UsageError (no .png, unknown field), CannotWrite (exists, not a folder, no permission).
    """

    def __init__(self, out: str | None, count: int, overwrite: bool = False) -> None:
        self.pattern = _pattern(out)  # what `-o` means: a template (str) or one file (Path)
        self.overwrite = overwrite
        self._now = datetime.now().astimezone()
        self._written: set[Path] = set()
        if isinstance(self.pattern, Path):
            self._root, parts = self.pattern.parent, list[str]()
            stem, self._files = self.pattern.stem, [self.pattern]
            if count > 1:
                self._files = [self.pattern.with_stem(f"{stem}-{i}") for i in range(1, count + 1)]
            for path in self._files:
                _check_file(path, overwrite)
        else:
            self._root, parts = _split(self.pattern)
            for part in parts:  # a template that is too long is refused now
                self._render(part, {"index": 10**6, "seed": 2**63, "steps": 10**4})
        self._parts = parts
        _check_folder(self._root)

    def write(
        self, picture: bytes, *, seed: int, prompt: str, model: str = "", scheduler: str = "", steps: int = 0
    ) -> Path:
        """Put the next picture (an encoded PNG) in place; its path, relative if `-o` was. Raises CannotWrite."""
        values: dict[str, int | str] = {
            "seed": seed,
            "steps": steps,
            "prompt": prompt,
            "model": model,
            "scheduler": scheduler,
        }
        with _folder(self._root, [self._render(part, values) for part in self._parts[:-1]]) as folder:
            if self._parts:
                return self._write_next(folder, self._parts[-1], picture, values)
            path = self._files.pop(0)
            publish(path, picture, self.overwrite)
            return path

    def _write_next(self, folder: Path, name: str, picture: bytes, values: Mapping[str, int | str]) -> Path:
        numbered = "index" in _names(name)
        with _locked(folder):  # another process may be numbering its pictures here
            index = _highest(folder, name) + 1 if numbered else 0
            extra = 0  # a name without {index} that is taken gets -1, -2, …
            while True:
                path = folder / self._render(name, {**values, "index": index}, f"-{extra}" if extra else "")
                replace = self.overwrite and not numbered and path not in self._written
                with contextlib.suppress(Exists):
                    if replace or not os.path.lexists(path):  # checked first, because publishing writes all the bytes
                        publish(path, picture, replace)
                        self._written.add(path)
                        return path
                index, extra = (index + 1, 0) if numbered else (index, extra + 1)

    def _render(self, part: str, values: Mapping[str, int | str], suffix: str = "") -> str:
        """One component of the template with its fields filled in, at most MAX_COMPONENT bytes; safe on Windows too."""
        for limit in SLUG_BYTES:
            text = ""
            for literal, field, spec in _fields(part):
                text += literal
                if field == "date":
                    text += slug(self._now.strftime(spec or "%Y-%m-%d"))
                elif field in ("prompt", "model", "scheduler"):
                    text += slug(str(values.get(field, ""))[: int(spec or 1000)], limit)
                elif field:
                    text += format(values[field], spec + "d")
            if suffix:
                text = text[: -len(".png")] + suffix + text[-len(".png") :]
            if text.split(".")[0].rstrip().upper() in RESERVED:
                text = "_" + text
            if len(os.fsencode(text)) <= MAX_COMPONENT:
                return text
        raise UsageError(f"-o: the name {part!r} becomes longer than {MAX_COMPONENT} bytes", "choose a shorter one")


class Beside:
    """Files about pictures, in a folder that the pictures are not in: NAME-WHAT for each picture called NAME.

    A name that is taken gets -1, -2, …; with `overwrite` it is replaced. Nothing is created before `write`. `option`
    is what named the folder. Raises UsageError for a folder that gets pictures and nothing else, CannotWrite.
    """

    def __init__(self, folder: str, outputs: Outputs, option: str, overwrite: bool = False) -> None:
        if not folder or "\0" in folder:
            raise UsageError(f"{option} names no folder", f"for example {option} seen")
        self.folder, self.option, self.overwrite = Path(folder), option, overwrite
        if isinstance(outputs.pattern, str):
            here, pictures = self.folder.resolve(), outputs._root.resolve()
            if here == pictures or (len(outputs._parts) > 1 and here.is_relative_to(pictures)):
                raise UsageError(
                    f"{option} {folder}: the pictures' folder, which gets nothing else", "name another one"
                )
        with _advising(option):
            _check_folder(self.folder)

    def write(self, picture: Path, files: Mapping[str, bytes]) -> list[Path]:
        """Write files by what they are ("steps.png") about one picture; their paths. Raises CannotWrite."""
        taken = 0
        with _advising(self.option), _folder(self.folder, []):
            while True:
                paths = [self.folder / self._name(picture.stem, what, taken) for what in files]
                if self.overwrite or not any(map(os.path.lexists, paths)):
                    for path, data in zip(paths, files.values(), strict=True):
                        publish(path, data, self.overwrite)
                    return paths
                taken += 1

    def _name(self, stem: str, what: str, taken: int) -> str:
        what, _, suffix = what.rpartition(".")
        return f"{stem}-{what}{f'-{taken}' if taken else ''}.{suffix}"


@contextlib.contextmanager
def _advising(option: str) -> Iterator[None]:
    """Inside, an error's advice is another folder of that option, not another -o."""
    try:
        yield
    except CannotWrite as error:
        error.hint = error.hint.replace("another -o", f"another {option}")
        raise


def _pattern(out: str | None) -> str | Path:
    """The template (str) or the one file (Path) that `-o` names."""
    if out is None:
        return DEFAULT
    if not out or "\0" in out:
        raise UsageError("-o is empty" if not out else "-o has a NUL character in it", "name a file or a folder")
    if os.path.isdir(out):
        return os.path.join(out.replace("{", "{{").replace("}", "}}"), DEFAULT_NAME)
    if out.endswith(SEPARATORS):
        return out + DEFAULT_NAME
    suffix = Path(out).suffix
    if suffix.lower() != ".png":
        seen = f"not as {suffix}" if suffix and "}" not in suffix else f"and {out!r} has no such suffix"
        raise UsageError(f"-o: pictures are written as .png, {seen}", "name a file: x.png, or a folder: x/")
    return out if "{" in out or "}" in out else Path(out)


def _split(template: str) -> tuple[Path, list[str]]:
    """(the folder before the first field, the components from there on). Raises UsageError for a field that is none."""
    parts = list(Path(template).parts)
    names = [_names(part) for part in parts]
    first = next((i for i, fields in enumerate(names) if fields), len(parts) - 1)
    if any("index" in fields for fields in names[:-1]):
        raise UsageError("-o: {index} numbers files, not folders", "put it into the file's name")
    if os.pardir in parts[first:]:
        raise UsageError("-o: `..` after a {field}", "write the folder out")
    plain = ("".join(literal for literal, _, _ in _fields(part)) for part in parts[:first])
    return Path(*plain), parts[first:]


def _fields(part: str) -> list[tuple[str, str, str]]:
    """(literal text, field, format) of each piece; the field is "" where only text is left."""
    hint = f"fields: {' '.join('{' + name + '}' for name in FIELDS)}; a brace itself is written {{{{ or }}}}"
    pieces = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(part):
            if field is not None and field not in FIELDS:
                raise UsageError(f"-o: there is no field {{{field}}}", hint)
            if field is not None and (conversion or not FIELDS[field].fullmatch(spec or "")):
                raise UsageError(f"-o: {part!r} asks {{{field}}} for a form that it doesn't have", hint)
            pieces.append((literal, field or "", spec or ""))
    except ValueError as error:
        raise UsageError(f"-o: {part!r}: {error}", hint) from error
    return pieces


def _names(part: str) -> set[str]:
    return {field for _, field, _ in _fields(part) if field}


def _highest(folder: Path, name: str) -> int:
    """The highest {index} among the folder's files that the template could have named; 0 if there are none."""
    pattern = "".join(
        re.escape(literal) + {"": "", "index": r"0*(\d{1,18})", "seed": r"\d+", "steps": r"\d+"}.get(field, ".*?")
        for literal, field, _ in _fields(name)
    )
    with os.scandir(folder) as entries:
        return max((int(m[1]) for entry in entries if (m := re.fullmatch(pattern, entry.name))), default=0)


def _check_file(path: Path, overwrite: bool) -> None:
    try:
        kind = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise cannot_write(path, error) from error
    if stat.S_ISDIR(kind):
        raise CannotWrite(f"cannot write {path}: it is a folder", "choose another -o")
    if not overwrite:
        raise Exists(path)


def _check_folder(folder: Path) -> None:
    """Check that files can be written there, in the folder or in the nearest one above it that exists."""
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise CannotWrite(f"cannot write to {folder}: {nearest} is not a folder", "choose another -o")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CannotWrite(f"cannot write to {folder}: no permission for {nearest}", "choose another -o")


@contextlib.contextmanager
def _folder(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Make the folder root/part/part…; below the root (which has no field) no symbolic link is followed.

    If the block fails, the folders that this made and that are still empty are removed.
    """
    folder = root.joinpath(*parts)
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        _make_folder(root, parts)
        yield folder
    except BaseException:
        for path in new:  # the innermost first
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _make_folder(root: Path, parts: Sequence[str]) -> None:
    folder = root
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            folder = folder / part
            folder.mkdir(exist_ok=True)
            if folder.is_symlink():
                raise CannotWrite(f"cannot write to {folder}: it is a symbolic link", "choose another -o")
    except RecursionError:
        raise CannotWrite(f"cannot write to {folder}: it has too many folders", "choose another -o") from None
    except OSError as error:
        raise cannot_write(folder, error) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes do not give out one number; without locks names stay unique."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
