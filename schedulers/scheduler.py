"""A scheduler is one choice from each axis: noise schedule × prediction × grid × solver.

`sample` runs it natively. The rest of the class is the diffusers protocol, the names that its pipelines touch; the
solver is the same in both. Nothing in either loop is read back from the device.
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

from schedulers.draws import Generators, normal
from schedulers.explicit import Explicit, is_grid_file
from schedulers.grid import Grid, Points
from schedulers.noise import NoiseSchedule, Point
from schedulers.prediction import Denoised
from schedulers.program import Key, Program
from schedulers.registry import UnknownName, check_grid, info, parse
from schedulers.solver import Solver, Steps, asked, corrected, rest_asking, run

from . import grids, prediction
from .explicit import explicit


class NonFinite(ArithmeticError):  # noqa: N818
    """The network's output, or the state after it, held nan or inf: from evaluation `step` on, at `t`, in `images`."""

    def __init__(self, step: int, t: float, images: list[int]) -> None:
        self.step, self.t, self.images = step, t, images
        which = f"image {images[0]}" if len(images) == 1 else f"images {', '.join(map(str, images))}"
        super().__init__(f"not finite from evaluation {step} on, at t = {t:g}, in {which}")


class Scheduler:
    """See `schedulers.get`, which makes one. Immutable but for the run that the diffusers protocol has under way.

    `generators`: what a stochastic solver draws from where a pipeline hands on none, as SD3's do; unless set, the
    global one.
    """

    order: int
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
        self._plain: Callable[..., Steps] = functools.partial(solver.function, **options)
        self.order = solver.evaluations_per_step
        self.timesteps = torch.empty(0)
        self._grid: Grid | None = None
        self._asked: list[Point] = []
        self._told_otherwise = False
        self._run: _Run | None = None
        self._begin_index = 0
        if not solver.native_only:
            self.nfe(self._steps or 2)  # a value that the solver refuses is refused now

    @property
    def name(self) -> str:
        return self.solver.name

    def __repr__(self) -> str:
        return f"<{self.name} on {self.grid_name}, {self.noise!r}, {self.prediction}>"

    def __getstate__(self) -> dict[str, Any]:
        """For copies: all but the run that is under way, and what `__setstate__` makes again."""
        return {k: v for k, v in self.__dict__.items() if k != "_pair"} | {"_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pair=prediction.bind(state["prediction"], state["noise"]))

    @property
    def _steps(self) -> int | None:
        return self.points.steps if isinstance(self.points, Explicit) else None

    def grid(self, steps: int | None = None) -> Grid:
        """The N + 1 points that `steps` steps walk over: 20 unless given, or as many as an explicit grid has."""
        return grids.build(self.points, self.noise, (self._steps or 20) if steps is None else steps)

    def _function(self, x: Any, grid: Grid, noise: Any) -> Steps:
        """The solver, with the corrections that a tuned grid brings."""
        return (corrected(self._plain, grid.corrections) if len(grid.corrections) else self._plain)(x, grid, noise)

    def nfe(self, steps: int) -> int:
        """Function evaluations that `steps` steps cost, counted by running the solver on the number 0."""
        return len(self._questions(self.grid(steps)))

    def steps_for(self, nfe: int) -> int:
        """The most steps that cost at most `nfe` function evaluations. Raises ValueError if one step costs more."""
        candidates = range(nfe // self.solver.evaluations_per_step + 1, 0, -1)
        if isinstance(self.points, Explicit) and (self.points.steps == 1 or not self.points.is_tuned):
            candidates = range(self.points.steps, self.points.steps - 1, -1)  # nothing to interpolate between
        for steps in candidates:
            if self.nfe(steps) <= nfe:
                return steps
        raise ValueError(f"{self.name} on {self.grid_name} cannot do with {nfe} evaluations")

    def _tell_of_interpolation(self, points: Points | str, grid: Grid) -> None:
        if isinstance(points, Explicit) and points.is_tuned and points.steps != grid.total:
            warnings.warn(
                f"the grid {points.name} was tuned for {points.steps} steps; it is interpolated to {grid.total}",
                stacklevel=3,
            )

    def _questions(self, grid: Grid) -> list[Point]:
        if self.solver.native_only:
            raise ValueError(f"{self.name} finds its times from the values it meets: it only runs natively (sample)")
        return asked(self._function, grid)

    # Natively

    def sample(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        steps: int | Grid | None = None,
        generators: Generators = None,
        callback: Callable[[int, Point, Denoised], None] | None = None,
    ) -> Tensor:
        """From the state x [B, …] at the grid's first point, as `start` makes it, to the picture.

        `denoiser(x, t)` gets t as a float tensor [B] and returns what `prediction` says; with EDM's preconditioning its
        x is scaled by c_in. `steps` is 20 unless given, or as many as an explicit grid has; a Grid of one's own serves
        too, such as `s.grid(20)[8:]`. `generators` is one for each image, or one for all, or none: torch's global one.
        `callback(i, point, denoised)` sees evaluation i. Returns float32. Raises NonFinite, after the loop.
        """
        if self.noise.dynamic is not None:
            raise ValueError(
                "the shift of this flow depends on the resolution: get it with noise.at_resolution(tokens)"
            )
        grid = steps if isinstance(steps, Grid) else self.grid(steps)
        self._tell_of_interpolation(self.points, grid)
        flags = _Flags()

        def denoise(state: Tensor, p: Point) -> Denoised:
            t = torch.full((1,), p.t, device=state.device) if isinstance(p.t, (int, float)) else p.t.float()
            shown = state * self._input_scale(p) if self._scales_input else state
            output = denoiser(shown.to(x.dtype), t.expand(state.shape[0])).float()
            flags.add(output, p)
            d = Denoised(state, output, p, self._pair, self._limit)
            if callback is not None:
                callback(len(flags.seen) - 1, p, d)
            return d

        def noise(p: Point, q: Point) -> Tensor:
            return normal(x.shape, generators, x.device)

        result, _ = run(self._function(x.float(), grid, noise), denoise)
        flags.check(result)
        return result

    def start(self, noise: Tensor, steps: int | Grid | None = None) -> Tensor:
        """The state at the grid's first point from standard normal noise: times √(α² + σ²). `steps` as in `sample`."""
        grid = steps if isinstance(steps, Grid) else self.grid(steps)
        return noise * grid[0].norm

    def _input_scale(self, p: Point) -> float:
        return prediction.input_scale(self.prediction, self.noise, p)

    # Inside diffusers

    @functools.cached_property
    def config(self) -> Config:
        """What pipelines read, and what a scheduler of diffusers made `from_config` needs: the noise in its names."""
        return Config(
            num_train_timesteps=self.noise.T,
            prediction_type=self.prediction,
            solver=self.name,
            grid=self.grid_name,
            noise=self.noise.name,
            **self.options,
            **self.limits,
            **_in_diffusers_names(self.noise),
        )

    @property
    def init_noise_sigma(self) -> float:
        """√(α² + σ²) at the first point: the deviation of the state there, for data of unit variance."""
        return (self._grid[0] if self._grid is not None else self.noise.noisiest).norm

    @property
    def sigmas(self) -> Tensor:
        """The noise level of each evaluation (σ/α; σ on a flow), and 0."""
        return torch.tensor([*map(self.noise.level, self._asked), 0.0])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the number of steps; `timesteps` then holds one time for each function evaluation.

        `timesteps` or `sigmas` (σ/α; on a flow σ before the shift, as its pipelines pass them) are walked instead of
        the grid if given, and both together mean: these levels, the network being told these times. `mu` is the shift
        for this resolution, where the flow's is dynamic. Raises ValueError for what does not fit, and for a solver that
        only runs natively.
        """
        noise, points = self.noise, self.points
        if noise.dynamic is not None:
            if mu is None:
                raise ValueError("the shift of this flow depends on the resolution: mu is needed")
            noise = noise.with_mu(mu)
        if sigmas is not None:
            if noise.name == "flow":
                sigmas = [noise.shifted(float(s)) for s in sigmas]
            points = explicit(sigmas=sigmas, model_times=timesteps)
        elif timesteps is not None:
            points = explicit(times=timesteps)
        if num_inference_steps is None:
            if not isinstance(points, Explicit):
                raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas")
            num_inference_steps = points.steps
        self._grid = grids.build(points, noise, num_inference_steps)
        self._tell_of_interpolation(points, self._grid)
        self._told_otherwise = isinstance(points, Explicit) and bool(points.model_times)
        self._asked = self._questions(self._grid)
        self.timesteps = torch.tensor([p.t for p in self._asked], dtype=torch.float32, device=device)
        self.num_inference_steps = num_inference_steps
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at the evaluation `begin_index`, as image-to-image does."""
        if not 0 <= begin_index < max(len(self._asked), 1):
            raise ValueError(f"the grid has {len(self._asked)} evaluations, it cannot begin at number {begin_index}")
        if begin_index and self.solver.upwards:
            raise ValueError(f"{self.name} goes from the picture to noise: it begins at 0, not at {begin_index}")
        self._begin_index, self._run = begin_index, None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state is the model's own: only EDM's preconditioning scales it, with c_in."""
        if not self._scales_input or not self._asked:
            return sample
        return sample * self._input_scale(self._next_point)

    @property
    def _next_point(self) -> Point:
        """The point of the next answer (of the last one, when all are given)."""
        i = self._run.done if self._run is not None else self._begin_index
        return self._asked[min(i, len(self._asked) - 1)]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = α(t)·x0 + σ(t)·ε, t [B]. Where the network is told other times than the levels', the next level's."""
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        if self._told_otherwise:
            alpha, sigma = self._next_point.alpha, self._next_point.sigma
        else:
            p = self.noise.at(t=timesteps.to(original_samples.device))
            alpha, sigma = p.alpha.float().reshape(shape), p.sigma.float().reshape(shape)
        return (alpha * original_samples.float() + sigma * noise.float()).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as the flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

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
        prev, x0 = self._run.step(model_output, sample, self.generators if generator is None else generator)
        return StepOutput(prev, x0) if return_dict else (prev, x0)

    def check_finite(self) -> None:
        """After the loop: raises NonFinite if an output of this run was not finite. The only read from the device."""
        if self._run is not None:
            self._run.flags.check(self._run.state)


class _Run:
    """One run of the solver with somebody else's loop round it: the state kept in float32, its edits taken over."""

    def __init__(self, scheduler: Scheduler, sample: Tensor) -> None:
        self.pair, self.limit, self.total = scheduler._pair, scheduler._limit, len(scheduler._asked)
        self.begin = self.done = scheduler._begin_index
        self.state: Any = None
        self.shape: Any = None
        self.flags = _Flags(self.begin)
        start = functools.partial(_from, scheduler._function, scheduler._grid, scheduler._asked, self.begin)
        self.steps: Steps | None = None
        self.values: dict[Key, Tensor] = {}
        try:
            self.program = Program(start, "sample" if self.limit is not None else self.pair)
        except (TypeError, AttributeError):
            self.steps = start(sample.float(), self._noise)
            self.state, self.point = next(self.steps)

    def _noise(self, p: Point, q: Point) -> Any:
        """None before the first question, whose state the pipeline has made."""
        return 0.0 if self.shape is None else normal(self.shape, self.generator, self.device)

    def step(self, output: Tensor, sample: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        i = self.done - self.begin
        if self.done >= self.total:
            raise RuntimeError(f"step was called more often than the grid has evaluations ({self.total})")
        x, output = sample.float(), output.float()
        if i > 0 and sample.dtype is not torch.float32:  # where nobody edited it, the state goes on unrounded
            x = torch.where(sample == self.state.to(sample.dtype), self.state, x)
        self.done += 1
        self.shape, self.device, self.generator = sample.shape, sample.device, generator
        point = self.program.points[i] if self.steps is None else self.point
        self.flags.add(output, point)
        d = Denoised(x, output, point, self.pair, self.limit)
        if self.steps is None:
            answer = d.predicted if self.limit is None else d.x0
            self.state = self.program.advance(i, self.values, x, answer, self._noise)
        else:
            try:
                self.state, self.point = self.steps.send(d)
            except StopIteration as stop:
                self.state = stop.value
        return self.state.to(sample.dtype), d.x0


def _from(function: Callable[..., Steps], grid: Any, questions: Any, begin: int, x: Any, noise: Any) -> Steps:
    """The solver from its question number `begin` on: it is started anew where a step begins, on the rest of the grid.

    Up to there, and further where it would not ask the questions that the caller was told, by first-order steps.
    """
    if begin == 0:
        return (yield from function(x, grid, noise))
    for i in range(begin, len(questions)):
        rest = rest_asking(function, grid, questions[i:])
        if rest is not None:
            return (yield from function(x, rest, noise))
        d = yield x, questions[i]
        q = questions[i + 1] if i + 1 < len(questions) else grid[-1]
        x = q.alpha * d.x0 + q.sigma * d.eps
    return x


class _Flags:
    """For each evaluation a sum over each image, left on the device: it is finite if what was summed is."""

    def __init__(self, begin: int = 0) -> None:
        self.begin = begin
        self.seen: list[tuple[Tensor, Any]] = []

    def add(self, output: Tensor, p: Point) -> None:
        self.seen.append((output.sum(tuple(range(1, output.ndim))) if output.ndim > 1 else output, p.t))

    def check(self, result: Tensor) -> None:
        """Read them all, once. Raises NonFinite."""
        if self.seen:
            self.add(result, Point(self.seen[-1][1], 1.0, 0.0))
            bad = ~torch.isfinite(torch.stack([sums for sums, _ in self.seen]))
            for i, row in enumerate(bad.tolist()):
                if any(row):
                    i = min(i, len(self.seen) - 2)
                    raise NonFinite(self.begin + i, float(self.seen[i][1]), [j for j, b in enumerate(row) if b])
            self.seen.pop()


# What is given


def _points(grid: Any, solver: Solver) -> Points | str:
    """The grid itself, checked. Raises UnknownName, and ValueError for a file that was tuned for another solver."""
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
    """Raises UnknownName for an option that the solver lacks, ValueError for a value that it cannot take."""
    for name in options:
        if name not in solver.options:
            raise UnknownName(f"option of {solver.name}", name, sorted(solver.options))
    solver.check(options)


def _limits(clip: bool | float, ratio: bool | float, most: float) -> tuple[dict[str, float], Any]:
    """(what was chosen, the function of x0 that does it or None). Raises ValueError."""
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


def _in_diffusers_names(noise: NoiseSchedule) -> dict[str, Any]:
    """The configuration that `from_diffusers_config` reads (of an edm schedule nothing: it has none)."""
    if noise.name == "flow":
        dynamic = {"use_dynamic_shifting": bool(noise.dynamic), **(noise.dynamic or {})}
        return {"use_flow_sigmas": True, "shift": noise.shift, "flow_shift": noise.shift, **dynamic}
    if noise.name in ("linear", "scaled_linear"):
        ends = {key: noise.recipe[key] for key in ("beta_start", "beta_end")}
        zero = bool(noise.recipe.get("zero_terminal_snr"))
        return {"beta_schedule": noise.name, **ends, "rescale_betas_zero_snr": zero}
    return {"trained_betas": list(noise.betas)} if noise.alphas_cumprod else {}


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
    label = parse(name)
    schedule = noise if isinstance(noise, NoiseSchedule) else NoiseSchedule.named(noise)
    limits = {"clip_sample": clip_sample, "thresholding": thresholding, "sample_max_value": sample_max_value}
    chosen = info(label.name)
    points = (label.grid or chosen.grid) if grid is None else grid
    return Scheduler(chosen, schedule, prediction, points, label.options | options, **limits)
