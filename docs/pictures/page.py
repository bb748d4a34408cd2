"""A page whose pictures are made by the commands that stand on it.

A comment before a block of commands (```bash: `diffgen` and the shell; or ```python) says what is to be seen:

    <!-- picture: NAME [columns=N] [gap=N] [captions] FILE… -->   the files, in rows or all in one, are NAME.png
    <!-- files: FILE… -->                                         the files are taken as they are
    <!-- terminal: NAME -->                                       half way through, a terminal shows NAME.png

All blocks of a page are run in one folder, as they use each other's files; samples/ is there too. Pictures are enlarged
twice; captions are the prompts, from the pictures' own records. What is Chinese in them needs a font that has it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffgen.cli import run
from diffgen.images.metadata import read_record

ROOT = Path(__file__).resolve().parents[2]
GAP = 8
INK, BACK = (60, 60, 60), (255, 255, 255)
CAPTION, LINE = 12, 15  # size of the letters, and from line to line
BLOCK = re.compile(r"<!-- (picture|files|terminal): ([^\n]+?) -->\n```(bash|python)\n(.*?)```\n", re.DOTALL)
COLUMNS, ROWS, CELL = 80, 24, (7, 15)  # of a terminal; pixels of a character
LIGHT, DARK = (200, 200, 200), (24, 24, 27)


@dataclass(frozen=True)
class Example:
    """What is to be seen, and the command lines, or the Python text as one, that make it."""

    kind: str
    name: str
    files: tuple[str, ...]
    lines: tuple[str, ...]
    python: bool = False
    columns: int | None = None  # all in one row
    gap: int = GAP  # pixels
    captions: bool = False


@dataclass(frozen=True)
class Page:
    """A Markdown file, and the folder of its pictures."""

    path: Path
    folder: Path
    apart: bool = False  # no block uses another one's files

    def examples(self) -> Iterator[Example]:
        for kind, said, language, text in BLOCK.findall(self.path.read_text("utf-8")):
            words = said.split()
            options = dict(word.split("=") for word in words if re.match(r"\w+=\d+$", word))
            files = [word for word in words if word != "captions" and word.partition("=")[0] not in options]
            python = language == "python"
            yield Example(
                kind,
                Path(files[0]).stem if kind == "files" else files[0],
                tuple(files if kind == "files" else files[1:]),
                (text,) if python else tuple(text.replace("\\\n", " ").splitlines()),
                python,
                **{key: int(value) for key, value in options.items()},
                captions="captions" in words,
            )


def make(example: Example, more: Sequence[str] = ()) -> None:
    """Run the example's commands in the current folder, `diffgen generate` with `more` options. Raises SystemExit."""
    for line in example.lines:
        words = shlex.split(line) if not example.python else []
        if example.python:
            code = subprocess.run([sys.executable, "-c", line]).returncode
        elif words[0] == "diffgen":
            code = run([*words[1:], *(more if words[1] == "generate" else ())])
        else:
            python = f"{shlex.quote(sys.executable)} " if words[0] == "python" else ""
            code = subprocess.run(["sh", "-c", python + line.removeprefix("python ") if python else line]).returncode
        if code:
            raise SystemExit(f"{line}: exit code {code}")


def together(example: Example) -> Image.Image:
    """The example's files from the current folder, row by row, each at twice its size or as high as the others."""
    paths = [path for file in example.files for path in (sorted(Path().glob(file)) if "*" in file else [Path(file)])]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    height = 2 * min(picture.height for picture in pictures)
    scaled = [
        picture.resize((picture.width * height // picture.height, height), Image.Resampling.NEAREST)
        for picture in pictures
    ]
    columns, gap = example.columns or len(scaled), example.gap
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    width = max(sum(p.width for p in row) + gap * (len(row) - 1) for row in rows)
    texts = [read_record(path)["prompt"] for path in paths] if example.captions else []
    below = 2 * LINE if texts else 0
    paper = Image.new("RGB", (width, len(rows) * (height + below + gap) - gap), BACK)
    draw = ImageDraw.Draw(paper)
    for i, row in enumerate(rows):
        left, top = 0, i * (height + below + gap)
        for j, picture in enumerate(row):
            paper.paste(picture, (left, top))
            if texts:
                caption(draw, texts[i * columns + j], left, top + height, picture.width)
            left += picture.width + gap
    return paper


def caption(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    """The text in the middle below a picture, the style in a second line. Raises SystemExit where no font has it."""
    font = ImageFont.load_default(CAPTION) if text.isascii() else ImageFont.truetype(font_file(":lang=zh-cn"), CAPTION)
    name, _, style = text.replace("，", ", ").partition(", ")
    for i, line in enumerate((name, style)):
        while font.getlength(line) > width:
            line = line[:-2] + "…"
        draw.text((left + width / 2, top + i * LINE + LINE // 2), line, INK, font, anchor="mm")


def font_file(pattern: str) -> str:
    """A font file that fits fontconfig's pattern. Raises SystemExit where there is none."""
    command, found = ["fc-list", "-f", "%{file}\n", pattern], []
    with contextlib.suppress(FileNotFoundError):
        found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    if not found:
        raise SystemExit(f"no font for {pattern}: apt-get install fontconfig fonts-wqy-microhei fonts-dejavu-core")
    return min(found)


def on_a_terminal(example: Example) -> Image.Image:
    """What a terminal shows of the example's one command when half of its steps are done."""
    import fcntl
    import termios

    sys.path.append(str(ROOT / "tests"))
    from terminal import Screen

    (line,) = example.lines
    here, their_end = os.openpty()
    fcntl.ioctl(their_end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "diffgen", *shlex.split(line)[1:]],
        env={**environment, "TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.DEVNULL,
        stderr=their_end,
    )
    os.close(their_end)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while data := os.read(here, 1 << 16):
            seen += data
    os.close(here)
    if process.wait():
        raise SystemExit(f"{line}: exit code {process.returncode}")
    screen = Screen(COLUMNS)
    for drawing in re.split(r"(?=\r(?!\n))", seen.decode()):  # each begins by going back over the one before
        screen.write(drawing)
        done = re.findall(r"(\d+)/(\d+) ", screen.text)
        if done and 2 * int(done[-1][0]) >= int(done[-1][1]) and "▀" in screen.text:
            break
    return drawn(line, screen.lines)


def drawn(command: str, lines: Sequence[Sequence[tuple]]) -> Image.Image:
    """A terminal's lines of (character, colour, colour behind it), below the command that was typed."""
    font = ImageFont.truetype(font_file("DejaVu Sans Mono:style=Book"), 11)
    rows = [[(c, None, None) for c in f"$ {command}"], *lines]
    width, height = CELL
    paper = Image.new("RGB", (COLUMNS * width + 2 * GAP, len(rows) * height + 2 * GAP), DARK)
    draw = ImageDraw.Draw(paper)
    for y, row in enumerate(rows):
        for x, (character, front, back) in enumerate(row):
            left, top = GAP + x * width, GAP + y * height
            if character == "▀":
                draw.rectangle((left, top, left + width - 1, top + height // 2 - 1), front)
                draw.rectangle((left, top + height // 2, left + width - 1, top + height - 1), back)
            else:
                draw.text((left, top), character, front if isinstance(front, tuple) else LIGHT, font)
    return paper


def remake(pages: Sequence[Page], names: Sequence[str] = ()) -> None:
    """Run the blocks of the pages, and write the pictures of these names, or all. Raises SystemExit."""
    for name in names:
        known = [example.name for page in pages for example in page.examples()]
        if name not in known:
            raise SystemExit(f"there is no {name}; there are {', '.join(known)}")
    for page in pages:
        examples = list(page.examples())
        wanted = [example for example in examples if not names or example.name in names]
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Path("samples").symlink_to(ROOT / "samples")
            for example in wanted if page.apart else examples[: examples.index(wanted[-1]) + 1] if wanted else ():
                if example.kind != "terminal":
                    make(example)
                if example in wanted:
                    show(example, page.folder)


def show(example: Example, folder: Path) -> None:
    """Write what is to be seen of an example whose files are in the current folder."""
    files = [folder / f"{example.name}.png"]
    if example.kind == "files":
        files = [Path(shutil.copy(file, folder)) for file in example.files]
    elif example.kind == "terminal":
        on_a_terminal(example).save(files[0], optimize=True)
    else:
        together(example).save(files[0], optimize=True)
    for file in files:
        print(file.stat().st_size, file.name, flush=True)
