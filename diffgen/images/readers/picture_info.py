"""How a picture was made, in the same terms for every tool; and how a tool's raw values become that."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import schedulers
from schedulers.explicit import is_grid_file
from schedulers.registry import LABELS

from ..metadata import base_name, label_of, printable

MAX_SEED = 2**64 - 1  # ComfyUI's
DEFAULTS = ("", "automatic", "default", "native", "none")  # what tools write for "as the sampler has it"
GRIDS = {"ddim": "leading"}  # names of schedules that elsewhere are names of samplers


@dataclass
class PictureInfo:
    """How a picture was made, by its file; None where the file does not give it.

    `scheduler` and `grid` are this engine's names where there is one, else the tool's.
    """

    tool: str
    prompt: str | None = None
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    grid: str | None = None
    width: int | None = None
    height: int | None = None
    model: str | None = None  # a base name

    label: str | None = None  # for --scheduler; None where there is no such scheduler here
    given_grid: str | None = None  # for --grid, also where the file leaves it to the tool
    syntax: str = "a1111"  # of the prompts: a1111 (theirs), plain, or ours
    strength: float | None = None  # of image to image
    clip_skip: int | None = None
    first_size: tuple[int, int] | None = None  # of the first pass, where width and height are the second's
    loras: list[tuple[str, float]] = field(default_factory=list)
    upscale: tuple[float, str, float | None] | None = None  # factor, lanczos or latent, strength
    variation: tuple[int, float] | None = None  # seed, share
    cpu_noise: bool | None = None  # drawn by torch on the CPU, as here
    more: list[str] = field(default_factory=list)  # further options of the command
    notes: list[str] = field(default_factory=list)  # what a command cannot say

    def sampled(self, name: Any, schedule: Any = None) -> None:
        """Set scheduler and grid from a tool's names for them."""
        label, plan = (text(name) or "")[:100], (text(schedule) or "")[:100]
        if label:
            same = f"{self.tool}_{label}"  # where a scheduler here has the name of another one there
            try:
                scheduler = schedulers.parse(same if same in LABELS else label)
            except ValueError:
                self.scheduler = label
                self.notes.append(f"there is no scheduler {label!r} here: the model's own is taken")
            else:
                self.scheduler, self.grid = scheduler.name, scheduler.grid
                self.label = label_of(scheduler.name, scheduler.options)
        if plan.lower() not in DEFAULTS:
            self.grid = GRIDS.get(plan.lower()) or _grid(plan)
            if self.grid is None:
                self.grid = plan
                self.notes.append(f"there is no grid {plan!r} here: the scheduler's own is taken")
                return
        self.given_grid = self.grid


def _grid(name: str) -> str | None:
    if is_grid_file(name):  # a file's name in a picture: never opened
        return None
    try:
        return schedulers.check_grid(name)
    except ValueError:
        return None


def text(value: Any) -> str | None:
    """A text without control characters; None for anything else."""
    return printable(value) if isinstance(value, str) else None


def name(value: Any) -> str | None:
    """A file's base name, or any name, without blanks round it; None for anything else."""
    return base_name(printable(value)).strip()[:200] or None if isinstance(value, str) else None


def as_int(value: Any, low: int, high: int) -> int | None:
    """A whole number in [low, high], also written as a text or with a fraction of 0; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,25}\s*", value):
        value = int(value)
    elif (parsed_number := number(value)) is not None and parsed_number.is_integer() and not isinstance(value, int):
        value = int(parsed_number)
    return value if type(value) is int and low <= value <= high else None


def number(value: Any) -> float | None:
    """A finite number, also written as a text; None for anything else."""
    if isinstance(value, str):
        if not re.fullmatch(r"\s*[+-]?(\d{1,30}\.?\d{0,30}|\.\d{1,30})(e[+-]?\d{1,3})?\s*", value, re.IGNORECASE):
            return None
        value = float(value)
    return float(value) if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def seed(value: Any) -> int | None:
    return as_int(value, 0, MAX_SEED)


def steps(value: Any) -> int | None:
    return as_int(value, 1, 10_000)


def side(value: Any) -> int | None:
    return as_int(value, 1, 65_536)


def size(value: Any) -> tuple[int | None, int | None]:
    """(width, height) of "512x768"; (None, None) for anything else."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*", value) if isinstance(value, str) else None
    return (side(match[1]), side(match[2])) if match else (None, None)


def parsed(value: Any) -> dict[str, Any] | None:
    """The object in a JSON text, or None. ComfyUI writes NaN, which no JSON has: it is read as null."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        record = json.loads(value, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def table(value: Any) -> dict[str, Any]:
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def entries(value: Any, limit: int = 100) -> list[Any]:
    """The first items of a list, else none."""
    return value[:limit] if isinstance(value, list) else []


def plain_number(value: float) -> str:
    """A number in full, without an exponent, as the command's options read it."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
