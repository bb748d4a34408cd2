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

from schedulers.diffusers_config import LIMITS, READ, from_diffusers_config, limits_of
from schedulers.draws import Generators
from schedulers.explicit import Explicit, explicit
from schedulers.noise import NoiseSchedule
from schedulers.protocol import Config
from schedulers.registry import info, names
from schedulers.scheduler import Scheduler


class DiffgenScheduler(Scheduler, SchedulerMixin, ConfigMixin):
    """A Scheduler with a configuration that diffusers writes and reads; `for_diffusers` makes one.

    `from_config` and `from_pretrained` also read the configuration of diffusers' own classes.
    """

    config_name = "scheduler_config.json"
    _compatibles = sorted({alias for name in names() for alias in info(name).aliases if alias.endswith("Scheduler")})

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

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Rebuild a scheduler from its configuration, or read the model's noise and prediction from that of another.

            pipe.scheduler = DiffgenScheduler.from_config(pipe.scheduler.config, solver="dpmpp_2m", grid="karras")

        `kwargs` replace arguments of this class, or keys of the configuration. Raises ValueError for a noise schedule
        or a prediction that is not supported.
        """
        if not isinstance(config, dict):  # a folder or a name
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        config = dict(config)
        if not {"solver", "noise", "prediction"} <= {*config}:
            changed = config | {key: kwargs.pop(key) for key in [*kwargs] if key in READ}
            noise, prediction = from_diffusers_config(changed)
            limits = limits_of(config)
            config = {key: value for key, value in config.items() if key not in READ + LIMITS}
            config |= {"noise": noise.recipe, "prediction": prediction, "limits": limits}
        else:
            follows = {*READ, *LIMITS, "variance_type", *(config["options"] or {})}  # from the arguments
            config = {key: value for key, value in config.items() if key not in follows}
        config.pop("_use_default_values", None)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def register_to_config(self, **changes: Any) -> None:
        """Write to the configuration, and change the prediction or the noise schedule where a key describes it."""
        if hasattr(self, "solver"):  # after the constructor
            Scheduler.register_to_config(self, **changes)
            changes |= {"noise": self.noise.recipe, "prediction": self.prediction}
        ConfigMixin.register_to_config(self, **changes)

    @property
    def config(self) -> Config:
        """`Scheduler.config`, with the other keys of the configuration that this scheduler was read from."""
        other = {key: value for key, value in self._internal_dict.items() if not key.startswith("_")}
        return Config({**other, **super().config})


def for_diffusers(scheduler: Scheduler) -> DiffgenScheduler:
    """The same scheduler in a form that pipelines save and load. Raises ValueError for a grid that is a function."""
    if not isinstance(scheduler.points, (str, Explicit)):
        raise ValueError(f"the grid {scheduler.grid_name} is a function, which cannot be saved")
    return DiffgenScheduler.from_config(scheduler.config)


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
