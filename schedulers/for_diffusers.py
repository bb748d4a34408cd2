"""Convert schedulers to and from diffusers' classes. Only this module of the package imports diffusers.

    from schedulers.for_diffusers import for_diffusers, from_diffusers
    pipe.scheduler = for_diffusers(schedulers.get("dpmpp_2m", …))   # the same, and can be saved and loaded
    x0 = from_diffusers(DDIMScheduler(…)).sample(denoiser, x, 20)   # a scheduler of diffusers in the native loop

Import this module before you load such a pipeline: diffusers does not import modules that a file names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from schedulers.draws import Generators
from schedulers.explicit import Explicit, explicit
from schedulers.noise import NoiseSchedule
from schedulers.registry import info
from schedulers.scheduler import Config, Scheduler


class DiffgenScheduler(Scheduler, SchedulerMixin, ConfigMixin):
    """A Scheduler with a configuration that diffusers writes and reads; `for_diffusers` makes one."""

    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        solver: str = "euler",
        noise: dict[str, Any] | None = None,
        prediction: str = "epsilon",
        grid: str | dict[str, Any] = "trailing",
        options: dict[str, Any] | None = None,
        limits: dict[str, float] | None = None,
    ) -> None:
        schedule = NoiseSchedule.from_recipe(noise or {"name": "scaled_linear"})
        points = grid if isinstance(grid, str) else explicit(**grid)
        Scheduler.__init__(self, info(solver), schedule, prediction, points, options or {}, **(limits or {}))

    @property
    def config(self) -> Config:
        """`Scheduler.config`, with the arguments from which `from_config` rebuilds this scheduler."""
        own = {key: value for key, value in self._internal_dict.items() if not key.startswith("_")}
        return Config({**super().config, **own})


def for_diffusers(scheduler: Scheduler) -> DiffgenScheduler:
    """The same scheduler in a form that pipelines save and load. Raises ValueError for a grid that is a function."""
    s, grid = scheduler, scheduler.points
    if isinstance(grid, Explicit):
        lists = {"times": grid.times, "sigmas": grid.sigmas, "model_times": grid.model_times}
        saved: Any = {key: list(values) for key, values in lists.items() if values}
        saved |= {"name": grid.name, "solver": grid.solver}
    elif isinstance(grid, str):
        saved = grid
    else:
        raise ValueError(f"the grid {s.grid_name} is a function, which cannot be saved")
    return DiffgenScheduler(s.name, s.noise.recipe, s.prediction, saved, dict(s.options), dict(s.limits))


class from_diffusers:  # noqa: N801  (used as a function)
    """A scheduler of diffusers with the `nfe`, `start` and `sample` of `Scheduler`."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.order = getattr(scheduler, "order", 1)

    def start(self, noise: Tensor, steps: int = 20) -> Tensor:
        """The starting state from standard normal noise; some classes scale it by the steps that were set last."""
        self.scheduler.set_timesteps(steps)
        return noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def nfe(self, steps: int) -> int:
        """Function evaluations that `steps` steps cost."""
        self.scheduler.set_timesteps(steps)
        return len(self.scheduler.timesteps)

    def sample(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        steps: int = 20,
        generators: Generators = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """As `Scheduler.sample`, with the state in diffusers' frame. `callback(i, t, state)` is called after step i."""
        s = self.scheduler
        s.set_timesteps(steps, device=x.device)
        takes = inspect.signature(s.step).parameters
        extra = {"generator": generators} if "generator" in takes else {}
        for i, t in enumerate(s.timesteps):
            scaled = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
            x = s.step(denoiser(scaled, t.float().expand(x.shape[0])), t, x, **extra, return_dict=False)[0]
            if callback is not None:
                callback(i, t, x)
        return x.to(torch.float32)
