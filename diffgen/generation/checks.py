"""Check the values of options: whole numbers, seeds, sizes, steps, guidance, a scheduler and its grid."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import schedulers
from diffgen.errors import UsageError

from .grid_files import check_grid

MAX_SEED = 2**32 - 1
MAX_SIDE = 8192
MAX_PICTURES = 100_000
MAX_BATCH = 4096

# Implementations of attention on this machine, by our names: diffusers'. The others come as code from a hub.
ATTENTION_BACKENDS = {
    "native": "native",
    "math": "_native_math",
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "flash3": "_flash_3",
    "sage": "sage",
    "xformers": "xformers",
    "flex": "flex",
}

# Used where neither the user nor the model sets them.
DEFAULTS = {"steps": 25, "guidance": 7.5, "scheduler": "dpmpp_2m", "grid": None}


def parse_size(size: Any) -> tuple[int, int]:
    """(width, height) from that pair, "WxH", "N" or N. Raises UsageError."""
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", size.strip())
        size = (int(match[1]), int(match[2] or match[1])) if match else size
    if isinstance(size, int):
        size = (size, size)
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int for n in size)):
        raise UsageError(f"--size must be WIDTHxHEIGHT in pixels (got {size!r})", "for example --size 512x512")
    return check_int("--size: the width", size[0], 1, MAX_SIDE), check_int("--size: the height", size[1], 1, MAX_SIDE)


def check_int(what: str, value: Any, low: int, high: int) -> int:
    """The value, a whole number in [low, high]. Raises UsageError."""
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{what} must be a whole number from {low} to {high} (got {value!r})")
    return value


def check_batch_size(value: Any) -> int | None:
    """The number of pictures at once; None for "auto". Raises UsageError."""
    if value in ("auto", None):
        return None
    if isinstance(value, str) and re.fullmatch(r"\d{1,4}", value):
        value = int(value)
    if type(value) is not int or not 1 <= value <= MAX_BATCH:
        raise UsageError(f"--batch-size must be a whole number from 1 to {MAX_BATCH}, or auto (got {value!r})")
    return value


def whole_number(low: int, high: int) -> Callable[[str, Any], int]:
    """The check of an option that is a whole number in [low, high]."""
    return lambda flag, value: check_int(flag, value, low, high)


def in_range(low: float, high: float) -> Callable[[str, Any], float]:
    """The check of an option that is a number in [low, high]."""
    return lambda flag, value: check_number(flag, value, low, high)


def check_backend(flag: str, value: Any) -> str:
    """The name of an implementation of attention on this machine. Raises UsageError."""
    if isinstance(value, str) and value.endswith("hub"):
        reason = "a backend of a hub is code that is fetched and run, which diffgen does not do"
        raise UsageError(f"{flag} {value}: {reason}", f"one of {', '.join(ATTENTION_BACKENDS)}")
    if value not in ATTENTION_BACKENDS:
        raise UsageError(f"{flag} must be one of {', '.join(ATTENTION_BACKENDS)} (got {value!r})")
    return str(value)


def check_bool(flag: str, value: Any) -> bool:
    """The value, True or False. Raises UsageError."""
    if not isinstance(value, bool):
        raise UsageError(f"{flag} must be True or False (got {value!r})")
    return value


def check_number(what: str, value: Any, low: float, high: float) -> float:
    """The value, a number in [low, high]. Raises UsageError."""
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{what} must be a number from {low:g} to {high:g} (got {value!r})")
    return float(value)


def check_share(what: str, value: Any) -> float:
    """The value, above 0 and up to 1. Raises UsageError."""
    if check_number(what, value, 0, 1) == 0:
        raise UsageError(f"{what} must be above 0: at 0 nothing is changed")
    return float(value)


def check_interval(what: str, value: str | Sequence[float]) -> tuple[float, float]:
    """A part of the steps as (from, to), from "A,B" or the numbers, 0 ≤ A < B ≤ 1. Raises UsageError."""
    try:
        low, high = (float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (ValueError, TypeError):
        low, high = math.nan, math.nan
    if not 0 <= low < high <= 1:
        raise UsageError(
            f"{what} must be A,B with 0 ≤ A < B ≤ 1 (got {value!r})",
            "0.2,0.8: not in the first and last fifth",
        )
    return low, high


def parse_numbers(
    option: str, text: str | Sequence[int], low: int, high: int, most: int = MAX_PICTURES
) -> tuple[int, ...]:
    """The numbers in "0-7", "1,5,9", "0-3,100", or the numbers, each once, at most `most`. Raises UsageError."""
    listed: list[int] = []
    for part in text.split(",") if isinstance(text, str) else text:
        first, dash, last = (piece.strip() for piece in str(part).partition("-"))
        ends = [int(end) if end.isascii() and end.isdigit() and len(end) < 11 else -1 for end in (first, last or first)]
        if not max(low, 0) <= ends[0] <= ends[1] <= high or ends[1] - ends[0] >= most or (dash and not last):
            raise UsageError(
                f"{option} must be numbers and ranges from {low} to {high} (got {text!r})",
                f"for example {low}-{low + 7},42",
            )
        listed += range(ends[0], ends[1] + 1)
    check_int(f"{option}: how many", len(listed), 1, most)
    return tuple(dict.fromkeys(listed))


def parse_seeds(text: str | Sequence[int]) -> tuple[int, ...]:
    """The seeds in "0-7", "1,5,9", "0-3,100", or the numbers. Raises UsageError."""
    return parse_numbers("--seeds", text, 0, MAX_SEED)


def which_seeds(count: int, seed: int | None, seeds: str | Sequence[int] | None) -> dict[str, Any]:
    """count, seed (random by default) and seeds (empty by default) of a plan, checked. Raises UsageError."""
    check_int("--count", count, 1, MAX_PICTURES)
    listed = () if seeds is None else parse_seeds(seeds)
    if listed and (seed is not None or count != 1):
        raise UsageError("--seeds sets the seeds and their number: leave --seed and --count out")
    if seed is not None:
        check_int("--seed", seed, 0, MAX_SEED)
        check_int("the last seed, --seed plus --count less 1,", seed + count - 1, 0, MAX_SEED)
    count = len(listed) or count
    if seed is None:
        seed = listed[0] if listed else secrets.randbelow(MAX_SEED - count + 2)
    return {"count": count, "seed": seed, "seeds": listed}


def check_sampling(
    values: dict[str, Any], native: bool = False, noise: schedulers.NoiseSchedule | None = None
) -> dict[str, Any]:
    """steps, guidance, scheduler and grid, checked, names in their canonical form. Raises UsageError, InputError.

    `native`: the model runs without a pipeline, so that any solver works. `noise` is the model's noise schedule, which
    the default grid depends on.
    """
    check_int("--steps", values["steps"], 1, 1000)
    guidance = values["guidance"]
    if type(guidance) not in (int, float) or not 0 <= guidance <= 100:
        raise UsageError(f"--guidance must be a number from 0 to 100 (got {guidance!r})", "1 is off; 3 to 9 are usual")
    try:
        name, named_grid = schedulers.resolve(str(values["scheduler"]))
    except schedulers.UnknownName as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    solver = schedulers.info(name)
    default = solver.grid if noise is None else solver.grid_for(noise)
    grid = check_grid(str(values["grid"] or named_grid or default))
    if solver.upwards:
        raise UsageError(f"--scheduler {name} goes from pictures to noise", "list: diffgen schedulers list")
    if solver.native_only and not native:
        raise UsageError(f"--scheduler {name} does not run inside a pipeline", "list: diffgen schedulers list")
    label = str(values["scheduler"])
    return {"steps": values["steps"], "guidance": float(guidance), "scheduler": name, "label": label, "grid": grid}


def check_guidance(chosen: Mapping[str, Any], why_not: str = "") -> list[str]:
    """Notes about the scale, for a CFG++ scheduler. Raises UsageError if there is no guidance, or one `why_not`."""
    name, guidance = chosen["scheduler"], chosen["guidance"]
    if not schedulers.info(name).cfg_pp:
        return []
    if why_not:
        raise UsageError(f"--scheduler {name} needs guidance, and this model {why_not}", "leave _cfg_pp out")
    if guidance == 1:
        raise UsageError(f"--scheduler {name} needs guidance, and --guidance 1 is off", "for a scale of 1 take 0.999")
    return [f"{name} guides far more than others: --guidance {guidance:g} is much, try 0.6"] if guidance > 2 else []
