"""The predictions of one run, as a strip and as an animation; each frame says that it is inside one run.

A picture inside a run is no picture of fewer steps: a run of ten steps walks another grid than the first ten of twenty.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .sheet import PAPER

TITLE = "Inside one run: the clean picture that each evaluation predicts. These are not pictures of fewer steps."
WIDTH = 1280  # pixels of a strip, at most, except for a single column
GAP, LINE = 6, 15  # pixels between frames; of a line of text
INK, BACK = (20, 20, 20), (255, 255, 255)
MILLISECONDS, LAST = 140, 1800  # how long a frame of the animation is shown, and the last one


class Step(NamedTuple):
    """The clean picture as one evaluation of the network predicts it."""

    image: Image.Image
    evaluation: int  # from 1
    t: float  # the time given to the network


def strip(steps: Sequence[Step]) -> Image.Image:
    """All steps of one run on one sheet, row by row, each with its number and time. Raises ValueError for none."""
    frames = _frames(steps, 96, 256)
    width, height = frames[0].size
    columns = max(1, min(len(frames), (WIDTH - GAP) // (width + GAP)))
    columns = math.ceil(len(frames) / math.ceil(len(frames) / columns))
    title = wrapped(TITLE, columns * (width + GAP) - GAP)
    top = GAP + len(title) * LINE
    cell = (width + GAP, height + LINE + GAP)
    size = (GAP + columns * cell[0], top + math.ceil(len(frames) / columns) * cell[1] + GAP)
    paper = Image.new("RGB", size, BACK)
    draw = ImageDraw.Draw(paper)
    draw.multiline_text((GAP, GAP // 2), "\n".join(title), INK, font(), spacing=LINE - 12)
    for i, (frame, step) in enumerate(zip(frames, steps, strict=True)):
        x, y = GAP + i % columns * cell[0], top + i // columns * cell[1]
        paper.paste(frame, (x, y))
        draw.text((x, y + height), f"{step.evaluation}/{len(steps)}  t {step.t:.4g}", INK, font())
    return paper


def animation(steps: Sequence[Step]) -> bytes:
    """The steps of one run as a GIF that repeats, one frame for each. Raises ValueError for none."""
    pictures, frames = _frames(steps, 192, 512), []
    width, height = pictures[0].size
    texts = [wrapped(f"inside one run: {step.evaluation}/{len(steps)}  t {step.t:.4g}", width) for step in steps]
    below = max(map(len, texts)) * LINE + 4
    for picture, text in zip(pictures, texts, strict=True):
        paper = Image.new("RGB", (width, height + below), BACK)
        paper.paste(picture, (0, 0))
        ImageDraw.Draw(paper).multiline_text((3, height), "\n".join(text), INK, font(), spacing=LINE - 12)
        frames.append(paper)
    file = io.BytesIO()
    times = [MILLISECONDS] * (len(frames) - 1) + [LAST]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0, disposal=1)
    return file.getvalue()


def font() -> Any:
    """The font of all captions, which comes with Pillow."""
    return ImageFont.load_default(11)


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, wherever its words allow."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and font().getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _frames(steps: Sequence[Step], least: int, most: int) -> list[Image.Image]:
    """The pictures, RGB, all of the last one's size, enlarged by a whole factor or made smaller to these sides."""
    if not steps:
        raise ValueError("a run without evaluations has no strip")
    size = steps[-1].image.size
    if max(size) <= most:
        factor = -(-least // max(size))
        size, how = (size[0] * factor, size[1] * factor), Image.Resampling.NEAREST
    else:
        scale = most / max(size)
        size, how = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))), Image.Resampling.LANCZOS
    frames = []
    for step in steps:
        frame = step.image.resize(size, how)
        paper = Image.new("RGB", size, (PAPER,) * 3)
        paper.paste(frame, (0, 0), frame if frame.mode == "RGBA" else None)
        frames.append(paper)
    return frames
