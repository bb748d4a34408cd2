"""Schedulers for diffusion models: noise schedule × prediction × grid × solver.

    import schedulers
    s = schedulers.get("dpmpp_2m", noise="scaled_linear", prediction="epsilon", grid="karras")
    x0 = s.sample(denoiser, x, steps=20)     # natively
    pipe.scheduler = s                       # in a diffusers pipeline

Names, aliases, orders and options are read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedulers.diffusers_config import from_diffusers_config
from schedulers.explicit import explicit, tuned
from schedulers.grid import Grid
from schedulers.noise import NoiseSchedule, Point
from schedulers.recommend import recommend
from schedulers.registry import UnknownName, check_grid, grid_names, info, names, parse, plugin_errors, resolve
from schedulers.solver import Solver, solver

if TYPE_CHECKING:
    from schedulers.scheduler import NonFinite, Scheduler, get

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


def __getattr__(name: str) -> Any:
    """Import what needs torch at its first use."""
    if name in ("NonFinite", "Scheduler", "get"):
        from . import scheduler

        return getattr(scheduler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
