"""Schedulers for diffusion models: noise schedule × prediction × grid × solver.

    import schedulers
    s = schedulers.get("dpmpp_2m", noise="scaled_linear", prediction="epsilon", grid="karras")
    x0 = s.sample(denoiser, x, steps=20)     # natively
    pipe.scheduler = s                       # in a diffusers pipeline

Names, aliases, orders and options are read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .grids import Grid
from .noise import NoiseSchedule, Point, from_diffusers_config
from .registry import UnknownName, check_grid, grid_names, info, names, resolve
from .solver import Solver, solver

if TYPE_CHECKING:
    from .scheduler import Scheduler

__all__ = [
    "Grid",
    "NoiseSchedule",
    "Point",
    "Solver",
    "UnknownName",
    "check_grid",
    "from_diffusers_config",
    "get",
    "grid_names",
    "info",
    "names",
    "resolve",
    "solver",
]


def get(
    name: str,
    *,
    noise: str | NoiseSchedule = "scaled_linear",
    prediction: str = "epsilon",
    grid: str | None = None,
    **options: Any,
) -> Scheduler:
    """A scheduler: one solver, by any of its names, with the noise schedule and the prediction of the model it will ask.

    `grid` is the solver's own unless given; an explicit grid wins over one in the name ("DPM++ 2M Karras").
    Raises UnknownName for a name, and ValueError for a combination that cannot work.
    """
    from .scheduler import Scheduler

    solver_name, named_grid = resolve(name)
    chosen = info(solver_name)
    unknown = [o for o in options if o not in chosen.options]
    if unknown:
        raise UnknownName(f"option of {chosen.name}", unknown[0], sorted(chosen.options))
    schedule = NoiseSchedule.named(noise) if isinstance(noise, str) else noise
    return Scheduler(chosen, schedule, prediction, check_grid(grid or named_grid or chosen.grid), options)
