"""A scheduler is one choice from each axis: noise schedule × prediction × grid × solver.

`sample` runs it natively. The rest of the class is the diffusers protocol, the names that its pipelines touch; the solver
is the same generator in both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import grids, prediction
from .grids import Grid
from .noise import NoiseSchedule, Point
from .prediction import Denoised
from .solver import Solver, Steps, asked, run

Generators = torch.Generator | Sequence[torch.Generator] | None


class Scheduler:
    """See `schedulers.get`, which makes one. Immutable but for the run that the diffusers protocol has under way."""

    order: int

    def __init__(self, solver: Solver, noise: NoiseSchedule, prediction_type: str, grid: str, options: dict[str, Any]) -> None:
        prediction.check(prediction_type, noise)
        self.solver, self.noise, self.prediction, self.grid_name, self.options = solver, noise, prediction_type, grid, options
        self._function: Callable[..., Steps] = functools.partial(solver.function, **options)
        self.order = solver.evaluations_per_step
        self.config = Config(
            num_train_timesteps=noise.T, prediction_type=prediction_type, solver=solver.name, grid=grid, noise=noise.name, **options
        )
        self.timesteps = torch.empty(0)
        self._grid: Grid | None = None
        self._asked: list[tuple[Point, int | None]] = []
        self._run: _Run | None = None
        self._begin_index = 0

    @property
    def name(self) -> str:
        return self.solver.name

    def __repr__(self) -> str:
        return f"<{self.name} on {self.grid_name}, {self.noise!r}, {self.prediction}>"

    def grid(self, steps: int) -> Grid:
        """The N + 1 points that `steps` steps walk over."""
        return grids.build(self.grid_name, self.noise, steps)

    def nfe(self, steps: int) -> int:
        """Function evaluations that `steps` steps cost, counted by running the solver on the number 0."""
        return len(asked(self._function, self.grid(steps)))

    # Natively

    def sample(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        steps: int = 20,
        generators: Generators = None,
        callback: Callable[[int, Point, Denoised], None] | None = None,
    ) -> Tensor:
        """From the state x [B, …] at the grid's first point (a standard normal times `init_noise_sigma`) to the picture, float32.

        `denoiser(x, t)` gets t as a float tensor [B] and returns what `prediction` says. `generators` is one generator for
        each image, or one for all; a stochastic solver needs them. `callback(i, point, denoised)` sees evaluation i.
        """
        count = 0

        def denoise(state: Tensor, p: Point) -> Denoised:
            nonlocal count
            t = torch.full((state.shape[0],), p.t, dtype=torch.float32, device=state.device)
            d = Denoised(state, denoiser(state.to(x.dtype), t).float(), p, self.prediction)
            if callback is not None:
                callback(count, p, d)
            count += 1
            return d

        noise = functools.partial(_normal, x.shape, x.device, generators)
        return run(self._function(x.float(), self.grid(steps), noise), denoise)[0]

    # Inside diffusers

    @property
    def init_noise_sigma(self) -> float:
        """√(α² + σ²) at the first point: the deviation of the state there, for data of unit variance."""
        p = self._grid[0] if self._grid is not None else self.noise.noisiest
        return float((p.alpha**2 + p.sigma**2) ** 0.5)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the number of steps; `timesteps` then holds one time for each function evaluation."""
        self._grid = self.grid(num_inference_steps)
        self._asked = asked(self._function, self._grid)
        self.timesteps = torch.tensor([p.t for p, _ in self._asked], dtype=torch.float32, device=device)
        self.num_inference_steps = num_inference_steps
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at the evaluation `begin_index`, as image-to-image does."""
        self._begin_index, self._run = begin_index, None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state is the model's own: nothing to scale."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α(t)·x0 + σ(t)·ε, t [B]."""
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        p = self.noise.at(t=timesteps.to(original_samples.device))
        x = p.alpha.reshape(shape) * original_samples.double() + p.sigma.reshape(shape) * noise.double()
        return x.to(original_samples.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Answer the solver's question with the network's output; returns the state that it asks about next."""
        if self._run is None:
            if self._grid is None:
                raise RuntimeError("step was called before set_timesteps")
            self._run = _Run(self, sample)
        prev, x0 = self._run.step(model_output, sample, generator)
        return StepOutput(prev, x0) if return_dict else (prev, x0)


class _Run:
    """One run of the solver with somebody else's loop around it: float32 state kept, the pipeline's edits taken over."""

    def __init__(self, scheduler: Scheduler, sample: Tensor) -> None:
        self.prediction, self.total = scheduler.prediction, len(scheduler._asked)
        self.generator: Generators = None
        self.handed: tuple[Tensor, int] | None = None
        self.done = scheduler._begin_index
        noise = functools.partial(self._noise, sample.shape, sample.device)
        self.steps = _from(scheduler._function, scheduler._grid, scheduler._asked, scheduler._begin_index, sample.float(), noise)
        self.state, self.point = next(self.steps)

    def _noise(self, shape: Any, device: Any, p: Point, q: Point) -> Tensor:
        return _normal(shape, device, self.generator, p, q)

    def step(self, output: Tensor, sample: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        if self.done >= self.total:
            raise RuntimeError(f"step was called more often than the grid has evaluations ({self.total})")
        self.done, self.generator = self.done + 1, generator
        unedited = self.handed is not None and self.handed[0] is sample and self.handed[1] == _version(sample)
        d = Denoised(self.state if unedited else sample.float(), output.float(), self.point, self.prediction)
        try:
            self.state, self.point = self.steps.send(d)
        except StopIteration as stop:
            self.state = stop.value
        prev = self.state.to(sample.dtype)
        self.handed = (prev, _version(prev))
        return prev, d.x0


def _from(function: Callable[..., Steps], grid: Any, questions: Any, begin: int, x: Any, noise: Any) -> Steps:
    """The solver from its question number `begin` on: by first-order steps to where its next step begins, then by itself."""
    for i in range(begin, len(questions)):
        p, step = questions[i]
        if step is not None:
            return (yield from function(x, grid[step:], noise))
        d = yield x, p
        q = questions[i + 1][0] if i + 1 < len(questions) else grid[-1]
        x = q.alpha * d.x0 + q.sigma * d.eps
    return x


def _normal(shape: Any, device: Any, generators: Generators, p: Point, q: Point) -> Tensor:
    """A standard normal of the state's shape; image i from generator i, drawn where that generator lives."""
    if isinstance(generators, Sequence):
        if len(generators) != shape[0]:
            raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}: one for each image is needed")
        return torch.stack([torch.randn(shape[1:], generator=g, device=g.device).to(device) for g in generators])
    where = device if generators is None else generators.device
    return torch.randn(shape, generator=generators, device=where).to(device)


def _version(x: Tensor) -> int:
    """Counts in-place edits (0 for tensors of inference mode, which do not count them)."""
    return 0 if x.is_inference() else x._version


class Config(dict):
    """Read as attributes too, as pipelines do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class StepOutput:
    prev_sample: Tensor
    pred_original_sample: Tensor

    def __getitem__(self, i: int) -> Tensor:
        return (self.prev_sample, self.pred_original_sample)[i]
