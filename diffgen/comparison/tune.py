"""`diffgen.tune`: learn a grid for a model, as the command does. Importing this imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import UsageError, checked_arguments
from diffgen.generation.checks import check_int
from diffgen.images.publish import Exists, check_writable, publish
from schedulers.explicit import is_grid_file

from . import plan

if TYPE_CHECKING:
    from .search import TunedGrid


@dataclass(frozen=True)
class SearchStart:
    """What a search begins with."""

    model: str
    solver: str
    nfe: int
    guidance: float
    noises: int  # to learn from
    held_out: int  # to select by
    warnings: Sequence[str]


@checked_arguments()
def tune(
    prompts: str | Sequence[str] = (),
    *,
    scheduler: str,
    nfe: int,
    out: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    guidance: float | None = None,
    iterations: int = 160,
    noises: int = 32,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    overwrite: bool = False,
    on_start: Callable[[SearchStart], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> TunedGrid:
    """Learn a grid: at which times a solver evaluates a model, for one budget and guidance scale.

        grid = diffgen.tune(model="mixture", scheduler="dpmpp_2m", nfe=5, out="mixture-5.json")
        grid.error, grid.built_in.error

    Writes the grid file `out`, and a picture beside it, only if it is better than every built-in grid.

    prompts     to learn from; by default drawn from the concepts that the model lists
    scheduler   a solver that draws no noise
    nfe         evaluations of the grid
    model       any model, or "mixture"; by default the bundled one
    guidance    the guidance scale of the grid, 1 is off; by default the model's
    iterations  at most so many gradients over all noises
    noises      starting noises to learn from: seeds 0, 1, …
    batch_size  noises in one call of the network
    device, dtype, offline, overwrite

    `on_start(search)` is called before the search, `on_step(done, total)` after each iteration; if `stop()` is true
    after one, the search ends with what it has. An exception in a callback ends it without a file.

    Raises NotBetter if no better grid was found, UsageError for an option, InputError for a model, CannotWrite.
    """
    device, dtype = device_name(device), dtype_name(dtype)
    entry = plan.parse_entries([scheduler])[0]
    if entry.stochastic:
        raise UsageError(f"--scheduler {scheduler} draws noise, so it has no fixed solution to come nearer to")
    check_int("--nfe", nfe, 1, 100)
    scales = () if guidance is None else plan.parse_guidance(str(guidance))
    check_int("--iterations", iterations, 1, 100_000)
    check_int("--noises", noises, 1, plan.SEEDS_BELOW - plan.HELD_OUT)
    check_int("--batch-size", batch_size, 1, plan.SEEDS_BELOW)
    path, picture_path = _paths(out, overwrite)
    environment.prepare(offline)
    from .search import Settings, Tuner, as_json
    from .subjects import subject_of
    from .tune_plot import draw

    name = None if model is None else os.fspath(model)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    subject, texts_used, (scale, *_) = subject_of(name, texts, scales, device, dtype, drawn=plan.SEEDS_BELOW)
    settings = Settings(iterations=iterations, noises=noises, batch=batch_size)
    if on_start is not None:
        remarks = tuple(subject.remarks)
        on_start(SearchStart(subject.name, entry.scheduler, nfe, scale, noises, settings.held_out, remarks))

    def prompt_of(seed: int) -> str:
        return texts_used[seed % len(texts_used)]

    try:
        grid = Tuner(subject, scheduler, prompt_of, scale, settings).tune(nfe, on_step, stop)
    except ValueError as error:
        raise UsageError(str(error)) from error
    picture = draw(subject, grid, prompt_of)
    publish(path, as_json(grid).encode(), overwrite)
    publish(picture_path, picture, overwrite)
    return replace(grid, path=path, picture=picture_path)


def _paths(out: str | os.PathLike[str] | None, overwrite: bool) -> tuple[Path, Path]:
    """The grid file, and the picture beside it. Raises UsageError, CannotWrite."""
    if out is None:
        raise UsageError("a grid needs a file to be written to", "add -o GRID.json")
    path = Path(out)
    if not is_grid_file(path.name):
        raise UsageError(f"-o must end in .json (got {str(out)!r})", "for example -o grid.json")
    for file in (path, path.with_suffix(".png")):
        if file.exists() and not overwrite:
            raise Exists(file)
    check_writable(path)
    return path, path.with_suffix(".png")
