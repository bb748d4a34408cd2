"""A scheduler is one choice from each axis: noise schedule × prediction × grid × solver.

`sample` is the native loop. The second half of the class is the diffusers protocol: the names that its pipelines use.
Both run the same solver, and neither reads a tensor back from the device inside the loop.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from schedulers.diffusers_config import to_diffusers_config
from schedulers.draws import Generators, normal
from schedulers.explicit import Explicit, explicit, is_grid_file
from schedulers.finite import NonFinite, OutputSums
from schedulers.grid import Grid, Points
from schedulers.noise import NoiseSchedule, Point
from schedulers.pipeline_run import PipelineRun, solve_from
from schedulers.prediction import Denoised
from schedulers.program import Program
from schedulers.registry import UnknownName, check_grid, info, parse
from schedulers.solver import Solver, Steps, corrected, evaluation_points, run

from . import grids, prediction

__all__ = ["Config", "NonFinite", "Scheduler", "StepOutput", "get"]


class Scheduler:
    """A solver with everything it needs; `schedulers.get` makes one.

    It is immutable, except for the run inside a pipeline. `generators` serve a stochastic solver where the pipeline
    passes none to `step`, as those of SD3; without them, PyTorch's global generator.
    """

    order: int  # evaluations a step, as diffusers' pipelines read it
    generators: Generators = None

    def __init__(
        self,
        solver: Solver,
        noise: NoiseSchedule,
        prediction_type: str,
        grid: str | Sequence[float] | Points,
        options: dict[str, Any],
        clip_sample: bool | float = False,
        thresholding: bool | float = False,
        sample_max_value: float = 1.0,
    ) -> None:
        prediction.check(prediction_type, noise)
        _check_options(solver, options)
        self.solver, self.noise, self.prediction, self.options = solver, noise, prediction_type, options
        self.points = _points(grid, solver)
        self.grid_name = grids.name_of(self.points)
        self.limits, self._limit = _limits(clip_sample, thresholding, sample_max_value)
        self._pair = prediction.bind(prediction_type, noise)
        self._scales_input = prediction_type in prediction.EDM_SIGNS
        self._uncorrected: Callable[..., Steps] = functools.partial(solver.function, **options)
        self.order = solver.evaluations_per_step
        self.timesteps = torch.empty(0)
        self._grid: Grid | None = None
        self._evaluations: list[Point] = []
        self._has_model_times = False
        self._run: PipelineRun | None = None
        self._begin_index = 0
        if not solver.native_only:
            self.nfe(self._fixed_steps or 2)  # raises ValueError now for an option that the solver refuses

    @property
    def name(self) -> str:
        return self.solver.name

    def __repr__(self) -> str:
        return f"<{self.name} on {self.grid_name}, {self.noise!r}, {self.prediction}>"

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy: without the current run, and without what `__setstate__` restores."""
        return {k: v for k, v in self.__dict__.items() if k != "_pair"} | {"_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pair=prediction.bind(state["prediction"], state["noise"]))

    @property
    def _fixed_steps(self) -> int | None:
        return self.points.steps if isinstance(self.points, Explicit) else None

    def grid(self, steps: int | None = None) -> Grid:
        """The N + 1 points of `steps` steps. The default is 20, or the length of an explicit grid."""
        return grids.build(self.points, self.noise, (self._fixed_steps or 20) if steps is None else steps)

    def solve(self, x: Any, grid: Grid, noise: Any) -> Steps:
        """The solver as a generator (see `schedulers.solver`), with its options and a tuned grid's corrections."""
        function = corrected(self._uncorrected, grid.corrections) if len(grid.corrections) else self._uncorrected
        return function(x, grid, noise)

    def evaluations(self, grid: Grid) -> list[Point]:
        """The point of each evaluation. Raises ValueError for a solver whose times depend on the values of x."""
        if self.solver.native_only:
            raise ValueError(f"{self.name} chooses its times from the values of x: it only runs natively (sample)")
        return evaluation_points(self.solve, grid)

    def program(self, grid: Grid, begin: int = 0) -> Program | None:
        """The run from evaluation `begin` on as a table of numbers; None where the solver is not linear in tensors."""
        try:
            return Program(self._solve_from(grid, begin), self._pair if self._limit is None else "sample")
        except (TypeError, AttributeError):
            return None

    def _solve_from(self, grid: Grid, begin: int) -> Callable[[Any, Any], Steps]:
        evaluations = self._evaluations if grid is self._grid else self.evaluations(grid) if begin else []
        return functools.partial(solve_from, self.solve, grid, evaluations, begin)

    def nfe(self, steps: int) -> int:
        """Function evaluations that `steps` steps cost, counted by running the solver on the number 0."""
        return len(self.evaluations(self.grid(steps)))

    def steps_for(self, nfe: int) -> int:
        """The most steps that cost at most `nfe` function evaluations. Raises ValueError if one step costs more."""
        candidates = range(nfe // self.solver.evaluations_per_step + 1, 0, -1)
        if isinstance(self.points, Explicit) and (self.points.steps == 1 or not self.points.is_tuned):
            candidates = range(self.points.steps, self.points.steps - 1, -1)  # this grid cannot be interpolated
        for steps in candidates:
            if self.nfe(steps) <= nfe:
                return steps
        raise ValueError(f"{self.name} on {self.grid_name} needs more than {nfe} evaluations")

    # Natively

    def start(self, noise: Tensor, steps: int | Grid | None = None) -> Tensor:
        """The state at the grid's first point from standard normal noise: times √(α² + σ²). `steps` as in `sample`."""
        grid = steps if isinstance(steps, Grid) else self.grid(steps)
        return noise * grid[0].norm

    def sample(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        steps: int | Grid | None = None,
        generators: Generators = None,
        callback: Callable[[int, Point, Denoised], None] | None = None,
    ) -> Tensor:
        """Sample pictures, float32 [B, …], from the state x [B, …] at the grid's first point, which `start` makes.

        `denoiser(x, t)` receives t as a float tensor [B] and returns what `prediction` says; with EDM's preconditioning
        its x is scaled by c_in. `steps` is 20 by default, or the length of an explicit grid; it can also be a Grid,
        such as `s.grid(20)[8:]`. `generators` is one for each image, one for all, or None for PyTorch's global one.
        `callback(i, point, denoised)` is called after evaluation i. Raises NonFinite after the loop.
        """
        if self.noise.dynamic is not None:
            raise ValueError("the shift of this flow depends on the resolution: use noise.at_resolution(tokens)")
        grid = steps if isinstance(steps, Grid) else self.grid(steps)
        _warn_if_interpolated(self.points, grid)
        sums = OutputSums()

        def denoise(state: Tensor, p: Point) -> Denoised:
            t = torch.full((1,), p.t, device=state.device) if isinstance(p.t, (int, float)) else p.t.float()
            scaled = state * self._input_scale(p) if self._scales_input else state
            output = denoiser(scaled.to(x.dtype), t.expand(state.shape[0])).float()
            sums.add(output, p)
            d = Denoised(state, output, p, self._pair, self._limit)
            if callback is not None:
                callback(len(sums) - 1, p, d)
            return d

        def noise(p: Point, q: Point) -> Tensor:
            return normal(x.shape, generators, x.device)

        result, _ = run(self.solve(x.float(), grid, noise), denoise)
        sums.check(result)
        return result

    def _input_scale(self, p: Point) -> float:
        return prediction.input_scale(self.prediction, self.noise, p)

    # Inside diffusers

    @functools.cached_property
    def config(self) -> Config:
        """What pipelines read, and the noise schedule in the names that diffusers' `from_config` reads."""
        return Config(
            num_train_timesteps=self.noise.T,
            prediction_type=self.prediction,
            solver=self.name,
            grid=self.grid_name,
            noise=self.noise.name,
            **self.options,
            **self.limits,
            **to_diffusers_config(self.noise),
        )

    @property
    def init_noise_sigma(self) -> float:
        """√(α² + σ²) at the first point: the standard deviation of the state there, for data of unit variance."""
        return (self._grid[0] if self._grid is not None else self.noise.noisiest).norm

    @property
    def sigmas(self) -> Tensor:
        """The noise level of each evaluation (σ/α; σ on a flow), and 0."""
        return torch.tensor([*map(self.noise.level, self._evaluations), 0.0])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the number of steps; `timesteps` then holds the time of each function evaluation.

        `timesteps` or `sigmas` replace the grid. `sigmas` are σ/α; on a flow, σ before the shift, as its pipelines pass
        them. With both, the levels are `sigmas`, and the network receives `timesteps`. `mu` is the shift for this
        resolution, on a flow whose shift is dynamic. Raises ValueError for arguments that do not fit, and for a solver
        that only runs natively.
        """
        noise, points = self.noise, self.points
        if noise.dynamic is not None:
            if mu is None:
                raise ValueError("the shift of this flow depends on the resolution: mu is needed")
            noise = noise.with_mu(mu)
        if sigmas is not None:
            if noise.is_flow:
                sigmas = [noise.shifted(float(s)) for s in sigmas]
            points = explicit(sigmas=sigmas, model_times=timesteps)
        elif timesteps is not None:
            points = explicit(times=timesteps)
        if num_inference_steps is None:
            if not isinstance(points, Explicit):
                raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas")
            num_inference_steps = points.steps
        self._grid = grids.build(points, noise, num_inference_steps)
        _warn_if_interpolated(points, self._grid)
        self._has_model_times = isinstance(points, Explicit) and bool(points.model_times)
        self._evaluations = self.evaluations(self._grid)
        self.timesteps = torch.tensor([p.t for p in self._evaluations], dtype=torch.float32, device=device)
        self.num_inference_steps = num_inference_steps
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at the evaluation `begin_index`, as image-to-image does."""
        count = len(self._evaluations)
        if not 0 <= begin_index < max(count, 1):
            raise ValueError(f"the grid has {count} evaluations, it cannot begin at number {begin_index}")
        if begin_index and self.solver.upwards:
            raise ValueError(f"{self.name} goes from the picture to noise: it begins at 0, not at {begin_index}")
        self._begin_index, self._run = begin_index, None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state itself; with EDM's preconditioning, scaled by c_in."""
        if not self._scales_input or not self._evaluations:
            return sample
        return sample * self._input_scale(self._next_point)

    @property
    def _next_point(self) -> Point:
        """The point of the next evaluation, or of the last one after the end."""
        i = self._run.done if self._run is not None else self._begin_index
        return self._evaluations[min(i, len(self._evaluations) - 1)]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α(t)·x0 + σ(t)·ε, t [B]. With model times in the grid, the level of the next evaluation instead."""
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        if self._has_model_times:
            alpha, sigma = self._next_point.alpha, self._next_point.sigma
        else:
            p = self.noise.at(t=timesteps.to(original_samples.device))
            alpha, sigma = p.alpha.float().reshape(shape), p.sigma.float().reshape(shape)
        return (alpha * original_samples.float() + sigma * noise.float()).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the arguments of the flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Send the network's output to the solver; return the state of the next evaluation."""
        if self._run is None:
            if self._grid is None:
                raise RuntimeError("step was called before set_timesteps")
            self._run = PipelineRun(
                self.program(self._grid, self._begin_index),
                self._solve_from(self._grid, self._begin_index),
                sample,
                self._pair,
                self._limit,
                (self._begin_index, len(self._evaluations)),
            )
        prev, x0 = self._run.step(model_output, sample, self.generators if generator is None else generator)
        return StepOutput(prev, x0) if return_dict else (prev, x0)


def _warn_if_interpolated(points: Points | str, grid: Grid) -> None:
    if isinstance(points, Explicit) and points.is_tuned and points.steps != grid.total:
        warnings.warn(
            f"the grid {points.name} was tuned for {points.steps} steps; it is interpolated to {grid.total}",
            stacklevel=3,
        )


def _points(grid: Any, solver: Solver) -> Points | str:
    """The grid, checked. Raises UnknownName, and ValueError for a file that was tuned for another solver."""
    if isinstance(grid, str):
        grid = check_grid(grid)
        if not is_grid_file(grid):
            return grid
        grid = grids.tuned(grid)
    elif not callable(grid):
        grid = explicit(times=grid)
    if isinstance(grid, Explicit) and grid.solver not in (None, solver.name):
        raise ValueError(f"the grid {grid.name} was tuned for {grid.solver}, not for {solver.name}")
    return grid


def _check_options(solver: Solver, options: dict[str, Any]) -> None:
    """Raise UnknownName for an option that the solver lacks, ValueError for a value that it cannot take."""
    for name in options:
        if name not in solver.options:
            raise UnknownName(f"option of {solver.name}", name, sorted(solver.options))
    solver.check(options)


def _limits(clip: bool | float, ratio: bool | float, most: float) -> tuple[dict[str, float], Any]:
    """(the limits on x0 by name, the function that applies them or None). Raises ValueError."""
    if clip and ratio:
        raise ValueError("clip_sample and thresholding exclude each other")
    if clip:
        limit = float(clip)  # True is 1
        if not 0 < limit < math.inf:
            raise ValueError(f"clip_sample must be above 0, got {clip}")
        return {"clip_sample": limit}, functools.partial(prediction.clip, limit=limit)
    if ratio:
        part = 0.995 if ratio is True else float(ratio)
        if not 0 < part <= 1 <= most < math.inf:
            raise ValueError(f"thresholding must lie in (0, 1] and sample_max_value from 1 up, got {part} and {most}")
        limits = {"thresholding": part, "sample_max_value": float(most)}
        return limits, functools.partial(prediction.threshold, ratio=part, limit=most)
    return {}, None


class Config(dict):
    """A dictionary whose keys can be read as attributes, as pipelines do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class StepOutput:
    """What `Scheduler.step` returns: the next state, and the clean picture that the network predicts."""

    prev_sample: Tensor
    pred_original_sample: Tensor

    def __getitem__(self, i: int) -> Tensor:
        return (self.prev_sample, self.pred_original_sample)[i]


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
    """Build a scheduler from a solver, by any of its names, and the model's noise schedule and prediction.

    `grid` is a name, a list of times, `explicit(…)`, the path of a grid file (.json), or a function of (noise, n). The
    default is the grid in the name ("DPM++ 2M Karras"), else the solver's own.
    `clip_sample` limits every x0 to ±1 (or ± that number). `thresholding` is Imagen's dynamic thresholding, at the
    quantile 0.995 (or that number), up to `sample_max_value`. Both are for models of pixels, not of latents.
    `options` are those of the solver: `info(name).options`.
    Raises UnknownName for a name, and ValueError for a value or a combination that cannot work.
    """
    label = parse(name)
    schedule = noise if isinstance(noise, NoiseSchedule) else NoiseSchedule.named(noise)
    limits = {"clip_sample": clip_sample, "thresholding": thresholding, "sample_max_value": sample_max_value}
    solver = info(label.name)
    points = (label.grid or solver.grid) if grid is None else grid
    return Scheduler(solver, schedule, prediction, points, label.options | options, **limits)
