"""Schedulers for diffusion models: noise schedule × prediction × grid × solver.

    import schedulers
    s = schedulers.get("dpmpp_2m", noise="scaled_linear", prediction="epsilon", grid="karras")
    x0 = s.sample(denoiser, x, steps=20)     # natively
    pipe.scheduler = s                       # in a diffusers pipeline

Names, aliases, orders and options are read without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from schedulers.explicit import explicit, tuned
from schedulers.grid import Grid, Points
from schedulers.noise import NoiseSchedule, Point, from_diffusers_config
from schedulers.recommend import recommend
from schedulers.registry import UnknownName, check_grid, grid_names, info, names, parse, plugin_errors, resolve
from schedulers.solver import Solver, solver

if TYPE_CHECKING:
    from schedulers.scheduler import NonFinite, Scheduler

__all__ = [
    "Grid",
    "NoiseSchedule",
    "NonFinite",
    "Point",
    "Scheduler",
    "Solver",
    "UnknownName",
    "check_grid",
    "explicit",
    "from_diffusers_config",
    "get",
    "grid_names",
    "info",
    "names",
    "parse",
    "plugin_errors",
    "recommend",
    "resolve",
    "solver",
    "tuned",
]


def get(
    name: str,
    *,
    noise: str | NoiseSchedule = "scaled_linear",
    prediction: str = "epsilon",
    grid: str | Sequence[float] | Points | None = None,
    clip_sample: bool | float = False,
    thresholding: bool | float = False,
    sample_max_value: float = 1.0,
    **options: Any,
) -> Scheduler:
    """A scheduler: one solver, by any of its names, with the noise schedule and the prediction of the model it asks.

    `grid` is the solver's own unless given: a name, a list of times, `explicit(…)`, the path of a grid file (.json),
    or a function of (noise, n); an explicit grid wins over one in the name ("DPM++ 2M Karras").
    `clip_sample` keeps every x0 inside ±1 (or ± that number). `thresholding` is Imagen's, with the quantile 0.995 (or
    that number), up to `sample_max_value`. Both are for models of pixels, not of latents.
    `options` are the solver's: `info(name).options`.
    Raises UnknownName for a name, and ValueError for a value or a combination that cannot work.
    """
    from schedulers.scheduler import Scheduler

    label = parse(name)
    schedule = noise if isinstance(noise, NoiseSchedule) else NoiseSchedule.named(noise)
    limits = {"clip_sample": clip_sample, "thresholding": thresholding, "sample_max_value": sample_max_value}
    chosen = info(label.name)
    points = (label.grid or chosen.grid) if grid is None else grid
    return Scheduler(chosen, schedule, prediction, points, label.options | options, **limits)


def __getattr__(name: str) -> Any:
    """Scheduler and NonFinite, which need torch, when they are asked for."""
    if name in ("NonFinite", "Scheduler"):
        from . import scheduler

        return getattr(scheduler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
