"""Make the pictures of a Markdown page from the commands on it.

A comment before a code block (```bash with `diffgen` and shell commands, or ```python) names the pictures:

    <!-- picture: NAME [columns=N] [gap=N] [captions] FILE… -->   join the files to NAME.png, in rows or in one row
    <!-- files: FILE… -->                                         copy the files as they are
    <!-- terminal: NAME -->                                       NAME.png is a terminal after half of the steps

All blocks of a page run in one folder, because they use each other's files. The folder has a link to samples/. Pictures
are enlarged twice. Captions are the prompts in the pictures' records; Chinese ones need a font with Chinese characters.
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
from diffgen.generation.record import read_record

ROOT = Path(__file__).resolve().parents[2]
GAP = 8
INK, BACK = (60, 60, 60), (255, 255, 255)
CAPTION, LINE = 12, 15  # font size and line height, pixels
BLOCK = re.compile(r"<!-- (picture|files|terminal): ([^\n]+?) -->\n```(bash|python)\n(.*?)```\n", re.DOTALL)
COLUMNS, ROWS, CELL = 80, 24, (7, 15)  # a terminal's size in characters; a character's in pixels
LIGHT, DARK = (200, 200, 200), (24, 24, 27)


@dataclass(frozen=True)
class Example:
    """A code block: its command lines (Python code is one of them), and the picture that they make."""

    kind: str
    name: str
    files: tuple[str, ...]
    lines: tuple[str, ...]
    python: bool = False
    columns: int | None = None  # None: one row
    gap: int = GAP  # pixels
    captions: bool = False


@dataclass(frozen=True)
class Page:
    """A Markdown file and the folder of its pictures."""

    path: Path
    folder: Path
    independent: bool = False  # no block uses the files of another

    def examples(self) -> Iterator[Example]:
        for kind, arguments, language, text in BLOCK.findall(self.path.read_text("utf-8")):
            words = arguments.split()
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
    """Run the commands in the current folder, `diffgen generate` with the options `more`. Raises SystemExit."""
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


def joined(example: Example) -> Image.Image:
    """The example's files in rows, enlarged twice or to the height of the others."""
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
    """Draw a prompt below a picture, its style on a second line. Raises SystemExit if no font has its letters."""
    font = ImageFont.load_default(CAPTION) if text.isascii() else ImageFont.truetype(font_file(":lang=zh-cn"), CAPTION)
    name, _, style = text.replace("，", ", ").partition(", ")
    for i, line in enumerate((name, style)):
        while font.getlength(line) > width:
            line = line[:-2] + "…"
        draw.text((left + width / 2, top + i * LINE + LINE // 2), line, INK, font, anchor="mm")


def font_file(pattern: str) -> str:
    """A font file that matches fontconfig's pattern. Raises SystemExit if there is none."""
    command, files = ["fc-list", "-f", "%{file}\n", pattern], []
    with contextlib.suppress(FileNotFoundError):
        files = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    if not files:
        raise SystemExit(f"no font for {pattern}: apt-get install fontconfig fonts-wqy-microhei fonts-dejavu-core")
    return min(files)


def terminal_picture(example: Example) -> Image.Image:
    """A terminal that runs the example's one command, after half of its steps."""
    import fcntl
    import termios

    sys.path.append(str(ROOT / "tests"))
    from terminal import Screen

    (line,) = example.lines
    parent_end, child_end = os.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "diffgen", *shlex.split(line)[1:]],
        env={**environment, "TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.DEVNULL,
        stderr=child_end,
    )
    os.close(child_end)
    output = b""
    with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
        while data := os.read(parent_end, 1 << 16):
            output += data
    os.close(parent_end)
    if process.wait():
        raise SystemExit(f"{line}: exit code {process.returncode}")
    screen = Screen(COLUMNS)
    for drawing in re.split(r"(?=\r(?!\n))", output.decode()):  # each overwrites the one before
        screen.write(drawing)
        counts = re.findall(r"(\d+)/(\d+) ", screen.text)
        if counts and 2 * int(counts[-1][0]) >= int(counts[-1][1]) and "▀" in screen.text:
            break
    return draw_terminal(line, screen.lines)


def draw_terminal(command: str, lines: Sequence[Sequence[tuple]]) -> Image.Image:
    """A terminal with a command and below it lines of (character, colour, background colour)."""
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
    """Run the pages' blocks and write the pictures of these names, or all pictures. Raises SystemExit."""
    for name in names:
        names_on_pages = [example.name for page in pages for example in page.examples()]
        if name not in names_on_pages:
            raise SystemExit(f"unknown picture {name!r}; choose from {', '.join(names_on_pages)}")
    for page in pages:
        examples = list(page.examples())
        wanted = [example for example in examples if not names or example.name in names]
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Path("samples").symlink_to(ROOT / "samples")
            for example in wanted if page.independent else examples[: examples.index(wanted[-1]) + 1] if wanted else ():
                if example.kind != "terminal":
                    make(example)
                if example in wanted:
                    write(example, page.folder)


def write(example: Example, folder: Path) -> None:
    """Write the pictures of an example whose files are in the current folder."""
    files = [folder / f"{example.name}.png"]
    if example.kind == "files":
        files = [Path(shutil.copy(file, folder)) for file in example.files]
    elif example.kind == "terminal":
        terminal_picture(example).save(files[0], optimize=True)
    else:
        joined(example).save(files[0], optimize=True)
    for file in files:
        print(file.stat().st_size, file.name, flush=True)
