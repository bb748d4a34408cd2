"""What can be asked of any model: prompts, seeds, steps, guidance, a scheduler, a size; checked without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import schedulers
from diffgen.errors import DiffgenError, InputError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from diffgen.models.find import Model

MAX_SEED = 2**32 - 1
MAX_SIDE = 8192
MAX_PICTURES = 100_000

# Where neither the command nor the model says otherwise.
DEFAULTS = {"steps": 25, "guidance": 7.5, "scheduler": "dpmpp_2m", "grid": None}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked order for pictures: picture i of each prompt has the seed `seed + i`."""

    model: Model
    prompts: tuple[str, ...]
    seed: int
    count: int  # pictures for each prompt
    steps: int
    guidance: float
    scheduler: str  # canonical
    label: str  # what it was asked for as: other tools' names can stand for options too
    grid: str
    width: int
    height: int
    batch_size: int
    notes: tuple[str, ...] = ()  # what concerns every picture

    def __len__(self) -> int:
        return len(self.prompts) * self.count

    def batches(self) -> Iterator[tuple[str, range]]:
        """(prompt, the numbers i of the pictures to make at once), prompts first, then seeds."""
        for prompt in self.prompts:
            for first in range(0, self.count, self.batch_size):
                yield prompt, range(first, min(first + self.batch_size, self.count))

    def warnings(self, prompt: str) -> list[str]:
        """What to know before looking at a picture of this prompt."""
        return list(self.notes)


@dataclass(frozen=True)
class Picture:
    """One picture of a plan with the record of how it was made; or, where it came out wrong, the error."""

    prompt: str
    seed: int
    image: Image.Image | None
    record: dict[str, Any]
    error: DiffgenError | None = None


def parse_size(size: Any) -> tuple[int, int]:
    """(width, height) from that pair, "WxH", "N" or N. Raises UsageError."""
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", size.strip())
        size = (int(match[1]), int(match[2] or match[1])) if match else size
    if isinstance(size, int):
        size = (size, size)
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int for n in size)):
        raise UsageError(f"--size must be WIDTHxHEIGHT in pixels (got {size!r})", "for example --size 512x512")
    return whole("--size: the width", size[0], 1, MAX_SIDE), whole("--size: the height", size[1], 1, MAX_SIDE)


def whole(what: str, value: Any, low: int, high: int) -> int:
    """The value, a whole number in [low, high]. Raises UsageError."""
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{what} must be a whole number from {low} to {high} (got {value!r})")
    return value


def sampling(values: dict[str, Any]) -> dict[str, Any]:
    """steps, guidance, scheduler and grid, checked, names in their canonical form. Raises UsageError, InputError."""
    whole("--steps", values["steps"], 1, 1000)
    guidance = values["guidance"]
    if type(guidance) not in (int, float) or not math.isfinite(guidance) or not 0 <= guidance <= 100:
        raise UsageError(f"--guidance must be a number from 0 to 100 (got {guidance!r})", "1 is off; 3 to 9 are usual")
    try:
        name, named_grid = schedulers.resolve(str(values["scheduler"]))
        solver = schedulers.info(name)
        grid = schedulers.check_grid(str(values["grid"] or named_grid or solver.grid))
    except schedulers.UnknownName as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    except (ValueError, OSError) as error:  # a grid of its own, from a file
        raise InputError(f"--grid {values['grid']}: {error}") from error
    if solver.native_only:
        raise UsageError(f"--scheduler {name} does not run inside a pipeline", "list: diffgen schedulers list")
    label = str(values["scheduler"])
    return {"steps": values["steps"], "guidance": float(guidance), "scheduler": name, "label": label, "grid": grid}
