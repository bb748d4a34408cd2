"""The pictures of docs/ways.md, made by the commands that stand there: `python docs/pictures/make.py [NAME…]`.

A block of commands that `<!-- picture: NAME FILE… -->` stands before is run, in one folder for all; the files that it
names become docs/pictures/NAME.png, side by side, at twice the size of the smallest. The blocks use each other's files,
so all of them run; with names, only those pictures are written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffgen.cli import run

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "ways.md"
GAP = 8
BLOCK = re.compile(r"<!-- picture: (\S+) ([^\n]+) -->\n```bash\n(.*?)```\n", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A picture of the page, the files that it shows, and the command lines that make them."""

    name: str
    files: tuple[str, ...]
    lines: tuple[str, ...]


def examples() -> Iterator[Example]:
    for name, files, lines in BLOCK.findall(PAGE.read_text("utf-8")):
        yield Example(name, tuple(files.split()), tuple(lines.splitlines()))


def make(example: Example, more: Sequence[str] = ()) -> None:
    """Run the example's commands in the current folder; diffgen's with `more` options. Raises SystemExit."""
    for line in example.lines:
        words = shlex.split(line)
        if words[0] == "diffgen":
            code = run([*words[1:], *more])
        else:
            python = f"{shlex.quote(sys.executable)} " if words[0] == "python" else ""
            code = subprocess.run(["sh", "-c", python + line.removeprefix("python ") if python else line]).returncode
        if code:
            raise SystemExit(f"{line}: exit code {code}")


def side_by_side(example: Example) -> Image.Image:
    """The example's files from the current folder."""
    pictures = [Image.open(file).convert("RGB") for file in example.files]
    height = 2 * min(picture.height for picture in pictures)
    scaled = [
        picture.resize((picture.width * height // picture.height, height), Image.Resampling.NEAREST)
        for picture in pictures
    ]
    sheet = Image.new("RGB", (sum(p.width for p in scaled) + GAP * (len(scaled) - 1), height), "white")
    left = 0
    for picture in scaled:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    return sheet


def main(names: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for example in examples():
            make(example)
            if not names or example.name in names:
                side_by_side(example).save(HERE / f"{example.name}.png", optimize=True)
                print(os.path.getsize(HERE / f"{example.name}.png"), example.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
