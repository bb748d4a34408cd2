"""Choose and check tuned grids, and describe them in records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.models.gate import sha256_of
from schedulers.explicit import is_grid_file


def check_grid(name: str) -> str:
    """The canonical name of a grid, or the path of a grid file, which is read. Raises UsageError, InputError."""
    try:
        return schedulers.check_grid(name)
    except schedulers.UnknownName as error:
        raise UsageError(str(error), "list: diffgen schedulers list") from error
    except (ValueError, OSError) as error:
        raise _unread(name, error) from error


def tuned_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler, steps and guidance that the grid file among the options was tuned for: the defaults beside it."""
    tuned = _tuned(options.get("grid"))
    if tuned is None or not tuned.is_tuned:
        return {}
    defaults = {"scheduler": tuned.solver, "steps": tuned.steps, "guidance": tuned.guidance}
    return {key: value for key, value in defaults.items() if value is not None}


def shipped_grid(paths: Iterable[Path], chosen: Mapping[str, Any]) -> str | None:
    """The first of a model's tuned grids that is for exactly this solver and number of steps, and for this guidance,
    or for any.

    `chosen` is what `checks.check_sampling` returned. Raises InputError.
    """
    label = schedulers.parse(chosen["label"])
    if label.grid or label.options:
        return None
    for path in map(str, paths):
        tuned = _tuned(path)
        fits = (tuned.solver, tuned.steps) == (chosen["scheduler"], chosen["steps"])
        if fits and tuned.guidance in (None, chosen["guidance"]):
            return path
    return None


def grid_notes(chosen: Mapping[str, Any]) -> list[str]:
    """Notes for a tuned grid that is used at other settings than its own."""
    tuned = _tuned(chosen["grid"])
    if tuned is None:
        return []
    notes = []
    if tuned.steps != chosen["steps"]:
        notes.append(
            f"the grid {tuned.name} was tuned for {tuned.steps} steps; it is interpolated to {chosen['steps']}"
        )
    if tuned.guidance is not None and tuned.guidance != chosen["guidance"]:
        notes.append(f"the grid {tuned.name} was tuned at guidance {tuned.guidance:g}, not {chosen['guidance']:g}")
    return notes


def check_grid_model(grid: str, model: str, model_hash: str) -> None:
    """Raises InputError for a grid file that was tuned for another model."""
    tuned = _tuned(grid)
    if tuned is not None and tuned.model_hash not in (None, model_hash):
        raise InputError(
            f"--grid {tuned.name} was tuned for another model than {model}",
            "choose another with --grid, or tune one: diffgen tune -m MODEL --scheduler NAME --nfe N -o GRID.json",
        )


def grid_file(grid: str) -> dict[str, str]:
    """The keys of a picture's record for a grid that is a file, besides its name."""
    return {"grid_sha256": sha256_of(Path(grid))} if is_grid_file(grid) else {}


def _tuned(grid: Any) -> Any:
    """The content of a grid file; None for a grid with a name. Raises InputError."""
    if not isinstance(grid, str) or not is_grid_file(grid):
        return None
    try:
        stat = os.stat(grid)
        return _read(grid, (stat.st_mtime_ns, stat.st_size))
    except (ValueError, OSError) as error:
        raise _unread(grid, error) from error


@lru_cache(maxsize=64)
def _read(path: str, state: tuple[int, int]) -> Any:
    """The content of a grid file in a state: a model's tuned grids are read once, not for every plan."""
    return schedulers.tuned(path)


def _unread(grid: str, error: ValueError | OSError) -> InputError:
    """The error for a grid that cannot be read."""
    if isinstance(error, OSError):
        hint = "diffgen tune writes such files; grids with a name: diffgen schedulers list"
        return InputError(f"cannot read the grid {grid}: {error.strerror}", hint)
    return InputError(f"cannot read the grid {error}")  # which names the file
