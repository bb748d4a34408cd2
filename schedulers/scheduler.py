"""A scheduler is one choice from each axis: noise schedule × prediction × grid × solver.

`sample` is the native loop. The second half of the class is the diffusers protocol: the names that its pipelines use.
Both run the same solver, and neither reads a tensor back from the device inside the loop.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulers.diffusers_config import READ, from_diffusers_config, to_diffusers_config
from schedulers.draws import Generators, normal
from schedulers.explicit import Explicit, explicit, is_grid_file
from schedulers.finite import NonFinite, OutputSums
from schedulers.grid import Grid, Points
from schedulers.noise import NoiseSchedule, Point
from schedulers.pipeline_run import PipelineRun, solve_from
from schedulers.prediction import Denoised
from schedulers.program import Program
from schedulers.protocol import (
    Config,
    StepOutput,
    distilled_times,
    index_of_value,
    index_of_view,
    is_default_ramp,
)
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
        _check_options(solver, options)
        self.solver, self.options = solver, options
        self.points = _points(grid, solver)
        self.grid_name = grids.name_of(self.points)
        self.limits, self._limit = _limits(clip_sample, thresholding, sample_max_value)
        self._uncorrected: Callable[..., Steps] = functools.partial(solver.function, **options)
        self.order = solver.evaluations_per_step
        self._has_model_times = False
        self._grid: Grid | None = None
        self._evaluations: list[Point] = []
        self._run: PipelineRun | None = None
        self._set_model(noise, prediction_type)
        if not solver.native_only:
            self.nfe(self._fixed_steps or 2)  # raises ValueError now for an option that the solver refuses

    @property
    def name(self) -> str:
        return self.solver.name

    def __repr__(self) -> str:
        return f"<{self.name} on {self.grid_name}, {self.noise!r}, {self.prediction}>"

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy, the current run included, without what `__setstate__` restores."""
        return {k: v for k, v in self.__dict__.items() if k != "_pair"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pair=prediction.bind(state["prediction"], state["noise"]))
        if self._run is not None:
            self._run.pair = self._pair

    def __copy__(self) -> Scheduler:
        return copy.deepcopy(self)  # two schedulers must not share a run

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
        """The point of each evaluation. Raises ValueError for a solver that chooses its own times."""
        if self.solver.native_only:
            raise ValueError(f"{self.name} chooses its own times: it only runs natively (sample)")
        return evaluation_points(self.solve, grid)

    def program(self, grid: Grid, begin: int = 0) -> Program | None:
        """The run from evaluation `begin` on as a table of numbers; None where the solver is not linear in tensors."""
        try:
            pair = self._pair if self._limit is None else "sample"
            return Program(self._solve_from(grid, begin), pair, self.solver.cfg_pp)
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
        denoiser: Callable[[Tensor, Tensor], Any],
        x: Tensor,
        steps: int | Grid | None = None,
        generators: Generators = None,
        callback: Callable[[int, Point, Denoised], None] | None = None,
    ) -> Tensor:
        """Sample pictures, float32 [B, …], from the state x [B, …] at the grid's first point, which `start` makes.

        `denoiser(x, t)` receives t as a float tensor [B] and returns what `prediction` says; with EDM's preconditioning
        its x is scaled by c_in. For a CFG++ solver it returns a pair: that, guided, and the same without the prompt.
        `steps` is 20 by default, or the length of an explicit grid; it can also be a Grid,
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
            output = denoiser(scaled.to(x.dtype), t.expand(state.shape[0]))
            output, without = self._outputs(output) if self.solver.cfg_pp else (output.float(), None)
            sums.add(output, p)
            d = Denoised(state, output, p, self._pair, self._limit, without)
            if callback is not None:
                callback(len(sums) - 1, p, d)
            return d

        def noise(p: Point, q: Point) -> Tensor:
            return normal(x.shape, generators, x.device)

        result, _ = run(self.solve(x.float(), grid, noise), denoise)
        sums.check(result)
        return result

    def _outputs(self, pair: Any) -> tuple[Tensor, Tensor]:
        """The outputs of a denoiser for CFG++, float32. Raises ValueError for anything else than a pair."""
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"{self._needs_pair}: denoiser(x, t) must return (the guided output, the other)")
        return pair[0].float(), pair[1].float()

    @property
    def _needs_pair(self) -> str:
        return f"{self.name} needs the network's output without the prompt too"

    def _input_scale(self, p: Point) -> float:
        return prediction.input_scale(self.prediction, self.noise, p)

    # Inside diffusers

    begin_index: int | None = None
    """The evaluation at which `set_begin_index` lets the next run start, if it was called after `set_timesteps`."""
    num_inference_steps: int | None = None

    @functools.cached_property
    def config(self) -> Config:
        """What pipelines read, and the noise schedule in the names that diffusers' `from_config` reads."""
        own = {"solver": self.name, "noise": self.noise.recipe, "prediction": self.prediction, "grid": self._saved_grid}
        return Config(
            **self.options | own,
            options=dict(self.options),
            limits=dict(self.limits),
            num_train_timesteps=self.noise.T,
            prediction_type=self.prediction,
            original_inference_steps=50,
            variance_type=self.options.get("variance", "fixed_small"),
            **to_diffusers_config(self.noise, self.limits),
        )

    @property
    def _saved_grid(self) -> str | dict[str, Any]:
        """The name of the grid, or the arguments of `explicit`."""
        if not isinstance(self.points, Explicit):
            return self.grid_name
        p = self.points
        lists = ("times", "sigmas", "model_times", "gains", "corrections")
        saved = {name: [*values] for name in lists if (values := getattr(p, name))}
        return saved | {"name": p.name, "solver": p.solver}

    def register_to_config(self, **changes: Any) -> None:
        """Change what the network predicts (`prediction_type`) or the noise schedule, in diffusers' names.

        Other keys change nothing here. Raises ValueError for a prediction or a noise schedule that is not supported.
        """
        changes = {key: value for key, value in changes.items() if key in READ and self.config.get(key) != value}
        if changes:
            described = {**self.config, **changes}
            if self.noise.alphas_cumprod and "trained_betas" not in changes and {*changes} - {"prediction_type"}:
                described.pop("trained_betas", None)
            self._set_model(*from_diffusers_config(described))

    def _set_model(self, noise: NoiseSchedule, prediction_type: str) -> None:
        """Set the noise schedule and the prediction, and forget what was computed from others."""
        prediction.check(prediction_type, noise)
        self.noise, self.prediction = noise, prediction_type
        self._pair = prediction.bind(prediction_type, noise)
        self._scales_input = prediction_type in prediction.EDM_SIGNS
        for name in ("config", "timesteps", "alphas_cumprod", "betas"):
            self.__dict__.pop(name, None)
        self._grid, self._evaluations, self._run, self.begin_index = None, [], None, None

    def __len__(self) -> int:
        """The number of training times."""
        return self.noise.T

    @property
    def init_noise_sigma(self) -> float:
        """√(α² + σ²) at the first point: the standard deviation of the state there, for data of unit variance."""
        return (self._grid[0] if self._grid is not None else self.noise.noisiest).norm

    @functools.cached_property
    def timesteps(self) -> Tensor:
        """The time of each function evaluation; before `set_timesteps` all training times, the noisiest first.

        They are whole numbers (int64) where each is a training time of a table, else float32.
        """
        return self._as_times(self._training_points)

    @property
    def sigmas(self) -> Tensor:
        """The noise level (σ/α; σ on a flow) at each of `timesteps`, and 0."""
        points = self._evaluations or self._training_points
        return torch.tensor([*map(self.noise.level, points), 0.0])

    @functools.cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t of a table, float32 [T]. Raises AttributeError on other schedules, as diffusers' classes do."""
        return self._table("alphas_cumprod")

    @functools.cached_property
    def betas(self) -> Tensor:
        """β_t of a table, float32 [T]. Raises AttributeError on other schedules, as diffusers' classes do."""
        return self._table("betas")

    def _table(self, name: str) -> Tensor:
        if not self.noise.alphas_cumprod:
            raise AttributeError(f"{name} is that of a table of noise levels; this is {self.noise!r}")
        return torch.tensor(getattr(self.noise, name), dtype=torch.float32)

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """ᾱ after the last step, which leads to the clean picture: 1."""
        return torch.tensor(1.0)

    @property
    def _training_points(self) -> Sequence[Point]:
        return grids.training_points(self.noise)

    def _as_times(self, points: Sequence[Point], device: Any = None) -> Tensor:
        whole = self.noise.alphas_cumprod and all(float(p.t).is_integer() for p in points)
        return torch.tensor([p.t for p in points], dtype=torch.float32, device=device).to(
            torch.int64 if whole else torch.float32
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set the number of steps; `timesteps` then holds the time of each function evaluation.

        `timesteps` or `sigmas` replace the grid. `sigmas` are σ/α; on a flow, σ before the shift, as its pipelines pass
        them. There 1, 1 − 1/n, …, 1/n, which a pipeline passes if its caller chose no list, only means n steps. With
        both, the levels are `sigmas`, and the network receives `timesteps`. `mu` is the shift for this resolution, on a
        flow whose shift is dynamic. `original_inference_steps` and `strength` are those of the pipelines for latent
        consistency models: the times that such a model was distilled on replace the grid. Raises ValueError for
        arguments that do not fit, and for a solver that only runs natively.
        """
        noise, points = self.noise, self.points
        if noise.dynamic is not None:
            if mu is None:
                raise ValueError("the shift of this flow depends on the resolution: mu is needed")
            noise = noise.with_mu(mu)
        if sigmas is not None and noise.is_flow:
            sigmas = [float(sigma) for sigma in sigmas]
            if timesteps is None and is_default_ramp(sigmas):
                num_inference_steps, sigmas = len(sigmas), None
            else:
                sigmas = noise.ended([noise.for_steps(len(sigmas)).shifted(sigma) for sigma in sigmas])
        if sigmas is not None:
            points = explicit(sigmas=sigmas, model_times=timesteps)
        elif timesteps is not None:
            points = explicit(times=timesteps)
        elif original_inference_steps is not None or strength < 1:
            every = original_inference_steps or self.config.original_inference_steps
            points = explicit(times=distilled_times(noise, num_inference_steps or every, every, strength))
        if num_inference_steps is None:
            if not isinstance(points, Explicit):
                raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas")
            num_inference_steps = points.steps
        self._grid = grids.build(points, noise, num_inference_steps)
        _warn_if_interpolated(points, self._grid)
        self._has_model_times = isinstance(points, Explicit) and bool(points.model_times)
        self._evaluations = self.evaluations(self._grid)
        self.timesteps = self._as_times(self._evaluations, device)
        self.num_inference_steps = num_inference_steps
        self.begin_index, self._run = None, None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at the evaluation `begin_index`, as image-to-image does.

        Without it, a run starts at the evaluation of the first time that `step` receives.
        """
        self._check_begin(begin_index)
        self.begin_index, self._run = begin_index, None

    def _check_begin(self, i: int) -> None:
        count = len(self._evaluations)
        if not 0 <= i < max(count, 1):
            raise ValueError(f"the grid has {count} evaluations, it cannot begin at number {i}")
        if i and self.solver.upwards:
            raise ValueError(f"{self.name} goes from the picture to noise: it begins at 0, not at {i}")

    @property
    def step_index(self) -> int | None:
        """The number of the next evaluation; None before the first `step`."""
        return None if self._run is None else self._run.done

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Sequence[float] | Tensor | None = None) -> int:
        """The number of the evaluation at this time. Reads the time, unless it is a view into `timesteps`."""
        if schedule_timesteps is not None:
            return index_of_value(float(timestep), [float(t) for t in schedule_timesteps])
        view = index_of_view(timestep, self.timesteps)
        return index_of_value(float(timestep), self._times) if view is None else view

    def previous_timestep(self, timestep: Any) -> Any:
        """The time of the evaluation after that at `timestep`; −1 after the last."""
        i = self.index_for_timestep(timestep) + 1
        return self.timesteps[i] if i < len(self.timesteps) else torch.tensor(-1)

    @property
    def _times(self) -> list[float]:
        return [p.t for p in self._evaluations or self._training_points]

    def _number(self, timestep: Any) -> int:
        """The number of the evaluation to which this time belongs: the next one of a run, or the first of a new one.

        A new run starts at `begin_index`, else where the time is in `timesteps`. Raises RuntimeError for a time that
        breaks the order of a run. A time that only its device knows is not read during a run.
        """
        run = self._run
        expected = self.begin_index if run is None else run.done
        if timestep is None or (run is None and expected is not None):
            return expected or 0
        i = index_of_view(timestep, self.timesteps)
        if i is None and isinstance(timestep, Tensor) and (timestep.is_meta or (run and timestep.device.type != "cpu")):
            return expected or 0
        if i is None:
            time = float(timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep)
            i = index_of_value(time, self._times, expected)
        if run is not None and i not in (expected, 0) and run.done < run.total:
            raise RuntimeError(
                f"step received the time of evaluation {i}, and the run is at evaluation {run.done}. "
                f"Call set_begin_index({i}) to start a new run there"
            )
        return i if run is None or i == 0 else run.done

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state itself; with EDM's preconditioning, scaled by c_in."""
        if sample.ndim == 0:
            raise NotImplementedError(
                "this pipeline applies EDM's preconditioning itself, to states x/α. This scheduler keeps the state "
                "α·x0 + σ·ε of the network. Use diffusers' EulerDiscreteScheduler in this pipeline"
            )
        if not self._scales_input or not self._evaluations:
            return sample
        i = min(self._number(timestep), len(self._evaluations) - 1)
        return sample * self._input_scale(self._evaluations[i])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α(t)·x0 + σ(t)·ε, t [B]. With model times in the grid, the level of the next evaluation instead."""
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        if self._has_model_times:
            p = self._evaluations[min(self._number(timesteps), len(self._evaluations) - 1)]
            alpha, sigma = p.alpha, p.sigma
        else:
            alpha, sigma = self._levels(timesteps, original_samples, shape)
        return (alpha * original_samples.float() + sigma * noise.float()).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the arguments of the flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α(t)·ε − σ(t)·x0, t [B]: what a network of v_prediction is trained to give."""
        alpha, sigma = self._levels(timesteps, sample, (-1,) + (1,) * (sample.ndim - 1))
        return (alpha * noise.float() - sigma * sample.float()).to(sample.dtype)

    def _levels(self, timesteps: Tensor, like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        p = self.noise.at(t=timesteps.to(like.device))
        return p.alpha.float().reshape(shape), p.sigma.float().reshape(shape)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        without: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Send the network's output to the solver; return the state of the next evaluation.

        `without` is the output without the prompt, where `model_output` is guided; CFG++ solvers need it. `settings`
        are those that diffusers' classes take: `eta`, `use_clipped_model_output`, `prev_timestep`. Raises
        ValueError for one that asks for something else than this scheduler does.
        """
        if self._grid is None:
            raise RuntimeError("step was called before set_timesteps")
        if self.solver.cfg_pp and without is None:
            hint = "step(…, without=…) takes it. Pipelines of diffusers pass the guided output only"
            raise ValueError(f"{self._needs_pair}: {hint}")
        begin = self._number(timestep)
        if settings:
            self._check_settings(begin, **settings)
        if self._run is None or (begin == 0 and self._run.done > 0):
            self._check_begin(begin)
            self._run = PipelineRun(
                self.program(self._grid, begin),
                self._solve_from(self._grid, begin),
                sample,
                self._pair,
                self._limit,
                (begin, len(self._evaluations)),
            )
        prev, x0 = self._run.step(model_output, sample, self.generators if generator is None else generator, without)
        return StepOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _check_settings(
        self,
        i: int,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        prev_timestep: Any = None,
        **others: Any,
    ) -> None:
        if others:
            raise TypeError(f"step does not take {', '.join(others)}: this pipeline needs a scheduler of its own")
        own = self.options.get("eta", self.solver.options.get("eta"))
        if eta and eta != own:
            hint = "its solver has no eta" if own is None else f"set it with schedulers.get({self.name!r}, eta={eta:g})"
            raise ValueError(f"the pipeline asks for eta = {eta:g}, this scheduler has {own}: {hint}")
        if use_clipped_model_output is False and self.limits:
            raise ValueError("use_clipped_model_output must be True or None: here ε always follows a limited x0")
        if prev_timestep is not None:
            view = index_of_view(prev_timestep, self.timesteps)
            after = index_of_value(float(prev_timestep), self._times, i + 1) if view is None else view
            if after != i + 1:
                raise ValueError(f"prev_timestep is evaluation {after}, not the next one ({i + 1}): call step for each")


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
    default is the grid in the name ("DPM++ 2M Karras"), else the solver's own for this noise schedule.
    `clip_sample` limits every x0 to ±1 (or ± that number). `thresholding` is Imagen's dynamic thresholding, at the
    quantile 0.995 (or that number), up to `sample_max_value`. Both are for models of pixels, not of latents.
    `options` are those of the solver: `info(name).options`.
    Raises UnknownName for a name, and ValueError for a value or a combination that cannot work.
    """
    label = parse(name)
    schedule = noise if isinstance(noise, NoiseSchedule) else NoiseSchedule.named(noise)
    limits = {"clip_sample": clip_sample, "thresholding": thresholding, "sample_max_value": sample_max_value}
    solver = info(label.name)
    points = (label.grid or solver.grid_for(schedule)) if grid is None else grid
    return Scheduler(solver, schedule, prediction, points, label.options | options, **limits)
