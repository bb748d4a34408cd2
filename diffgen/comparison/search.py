"""Learn a grid: at which times a solver evaluates a model, by differentiating through the ordinary solver.

For one model, solver, NFE and guidance it learns the noise levels of the grid; the times that the network receives at
them; and, for a solver with one evaluation a step, corrections of its coefficients: a gain for the latest output, and
weights for up to four earlier ones. All start at the best built-in grid, uncorrected. The loss is the distance to a
teacher, the same ODE solved with many evaluations (or exactly), from the same noises; the best on held-out noises is
kept. With few parameters and one set of noises, L-BFGS on all of them at once needs fewer evaluations than Adam.
Ideas: Watson et al. 2021 (2106.03802), LD3 (Tong et al. 2024, 2405.15506), S4S (Frankel et al. 2025, 2502.17423).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import schedulers
from diffgen.errors import DiffgenError
from schedulers.grid import Grid
from schedulers.noise import CLEAN, NoiseSchedule, Point
from schedulers.scheduler import NonFinite

from .plan import HELD_OUT, SEEDS_BELOW, Entry, is_stochastic, parse_entries
from .results import to_json
from .run import AUTOMATIC, versions
from .subjects import Network, Subject

SCHEMA = "diffgen.grid/1"
EARLIER = 4  # earlier outputs that a correction takes in
BATCH = 16  # examples in one call of a network without gradients
NOT_FINITE = 1e9  # the loss of parameters with a result that is not finite


class NotBetter(DiffgenError):  # noqa: N818
    """No grid better than the built-in ones was found."""


@dataclass(frozen=True)
class Settings:
    """The settings of the search."""

    iterations: int = 160  # at most so many evaluations of the loss and its gradient
    noises: int = 32  # noises to learn from: seeds 0, 1, …
    held_out: int = HELD_OUT  # noises to select by: the seeds just below SEEDS_BELOW
    batch: int = 8  # noises in one call of the network with gradients; of the mixture all
    every: int = 8  # iterations between two evaluations on the held-out noises
    patience: int = 3  # such evaluations without a better value before the search ends
    margin: float = 0.05  # by which the result must be better than the best built-in grid
    teacher: int = 128  # evaluations of the teacher


@dataclass(frozen=True)
class BuiltIn:
    """The errors of the built-in grids on the held-out noises, and the best of them."""

    grid: str
    error: float
    all: dict[str, float]


@dataclass(frozen=True)
class Check:
    """The error on the held-out noises after some iterations."""

    iteration: int
    error: float


@dataclass(frozen=True)
class TunedGrid:
    """A learned grid, the content of its file. What is None is not in the file."""

    solver: str
    nfe: int
    sigmas: tuple[float, ...] | None  # noise levels: σ/α, or σ for a flow
    times: tuple[float, ...] | None  # instead of the levels, where the first is infinite
    model_times: tuple[float, ...]  # the times that the network receives
    gains: tuple[float, ...] | None
    corrections: tuple[tuple[float, ...], ...] | None
    guidance: float
    model: str
    model_hash: str
    error: float  # on the held-out noises
    built_in: BuiltIn
    ratio: float  # of the error to that of the best built-in grid
    validation: tuple[Check, ...]  # the course of the search
    settings: Settings
    versions: dict[str, str]
    path: Path | None = field(default=None, metadata={"stored": False})  # the grid file
    picture: Path | None = field(default=None, metadata={"stored": False})

    def to_json(self) -> dict[str, Any]:
        """The content of the grid file."""
        content = {"schema": SCHEMA, **to_json(self)}
        return {name: value for name, value in content.items() if value is not None}


@dataclass
class Starts:
    """Starting noises of some seeds with their prompts, and the teacher's solutions."""

    x: Tensor  # [S·B, …], standard normal
    seeds: list[int]
    prompts: list[str]  # one for each row of x
    solution: Tensor = field(default_factory=lambda: torch.empty(0))

    def part(self, indices: Sequence[int]) -> Starts:
        """The starts of some of the seeds."""
        size = len(self.x) // len(self.seeds)
        rows = torch.cat([torch.arange(i * size, (i + 1) * size) for i in indices])
        solution = self.solution[rows] if len(self.solution) else self.solution
        seeds, prompts = [self.seeds[i] for i in indices], [self.prompts[r] for r in rows.tolist()]
        return Starts(self.x[rows], seeds, prompts, solution)

    def errors(self, result: Tensor) -> Tensor:
        """The root-mean-square distance to the teacher's solution for each seed, [S]."""
        return (result - self.solution).reshape(len(self.seeds), -1).square().mean(1).sqrt()


class Learned(torch.nn.Module):
    """The parameters, and the grid that they describe.

    Levels: fractions of the way in λ = ln(α/σ) from the first level to the least noise, as a softmax of increments, so
    that the noise always falls. Times: offsets from those of the levels, in hundredths of T. Corrections: unchanged.
    """

    def __init__(self, noise: NoiseSchedule, start: Sequence[Point], corrections: bool) -> None:
        super().__init__()
        self.noise, self.start = noise, list(start)
        self.top = noise.at(t=noise.t_max - 1).lam if start[0].alpha == 0 else start[0].lam
        self.bottom = noise.at(t=noise.t_min).lam
        moving = [p.lam for p in start[1:]]
        gaps = [b - a for a, b in zip([self.top, *moving], [*moving, self.bottom], strict=True)]
        least = (self.bottom - self.top) * 1e-4
        self.gaps = torch.nn.Parameter(torch.tensor([max(g, least) for g in gaps], dtype=torch.float64).log())
        self.offsets = torch.nn.Parameter(torch.zeros(len(start), dtype=torch.float64))
        columns = 1 + min(len(start) - 1, EARLIER)
        self.corrections = torch.nn.Parameter(
            torch.zeros(len(start), columns, dtype=torch.float64), requires_grad=corrections
        )

    def points(self) -> list[Point]:
        """The points of the grid, their numbers 0-d tensors with gradients."""
        fractions = torch.softmax(self.gaps, 0).cumsum(0)[:-1]
        levels = self.top + (self.bottom - self.top) * fractions
        points = [self.start[0], *(self.noise.at(lam=level) for level in levels)]
        last = float(self.noise.t_max)
        shift = self.offsets * (self.noise.T / 100)
        return [replace(p, t=(p.t + s).clamp(0.0, last)) for p, s in zip(points, shift, strict=True)]

    def grid(self) -> Grid:
        """The grid with its corrections, which carries gradients."""
        corrections: Any = self.corrections if self.corrections.requires_grad else ()
        return Grid([*self.points(), CLEAN], self.noise, corrections=corrections)

    @torch.no_grad()
    def described(self) -> dict[str, Any]:
        """The fields of `TunedGrid` that describe the grid."""
        points = self.points()
        levels = tuple(float(self.noise.level(p)) for p in points)
        finite = math.isfinite(levels[0])
        rows = [tuple(round(c, 8) for c in row) for row in self.corrections.tolist()]
        corrected = self.corrections.requires_grad
        return {
            "sigmas": levels if finite else None,
            "times": None if finite else tuple(self._time(p) for p in points),
            "model_times": tuple(float(p.t) for p in points),
            "gains": tuple(row[0] for row in rows) if corrected else None,
            "corrections": tuple(row[1:] for row in rows) if corrected and len(rows) > 1 else None,
        }

    def _time(self, p: Point) -> float:
        """The time of the level itself, whatever the network receives there."""
        return float(self.noise.t_max if p.alpha == 0 else self.noise.at(lam=float(p.lam)).t)


class Tuner:
    """One solver on one model at one guidance scale. Every NFE shares the teacher's solutions."""

    def __init__(
        self,
        subject: Subject,
        label: str,
        prompt_of: Callable[[int], str],
        guidance: float = 1.0,
        settings: Settings = Settings(),
    ) -> None:
        """`prompt_of(seed)` is the prompt for that seed.

        Raises ValueError for a scheduler that draws noise or has options of its own, and for too many noises.
        """
        if is_stochastic(label):
            raise ValueError(f"{label} draws noise, so it has no fixed solution that a grid could come nearer to")
        solver = schedulers.info(label)
        if solver.options | schedulers.parse(label).options != solver.options:
            raise ValueError(f"{label} is {solver.name} with other options, which a grid file does not record")
        if settings.noises + settings.held_out > SEEDS_BELOW:
            raise ValueError(
                f"of {SEEDS_BELOW} noises {settings.held_out} are held out: {settings.noises} are too many"
            )
        self.subject, self.label, self.guidance, self.settings = subject, label, guidance, settings
        self.solver = SolverOnModel(subject, label, guidance)
        self.train = self.solver.starts(range(settings.noises), prompt_of)
        self.test = self.solver.starts(range(SEEDS_BELOW - settings.held_out, SEEDS_BELOW), prompt_of)

    def tune(
        self,
        nfe: int,
        on_step: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> TunedGrid:
        """Learn a grid of `nfe` evaluations.

        `on_step(done, total)` counts iterations; if `stop()` is true after one, the search ends with what it has.
        Raises NotBetter, and ValueError for a scheduler that cannot make exactly `nfe` evaluations.
        """
        solver, settings = self.solver, self.settings
        steps = solver.scheduler("karras").steps_for(nfe)
        if (evaluations := solver.scheduler("karras").nfe(steps)) != nfe:
            raise ValueError(f"{self.label} cannot make exactly {nfe} evaluations (it makes {evaluations})")
        for starts in (self.train, self.test):
            if not len(starts.solution):
                starts.solution = solver.teacher(starts, settings.teacher)
        built_in = solver.built_in(nfe, self.test)
        first = min(built_in, key=lambda name: built_in[name])
        once = schedulers.info(schedulers.parse(self.label).name).evaluations_per_step == 1
        points = solver.scheduler(first).grid(steps).points[:-1]
        learned = Learned(self.subject.noise, points, corrections=once and len(points) == nfe)
        validation = self._search(learned, on_step, stop)
        lowest = min(check.error for check in validation)
        if not lowest <= (1 - settings.margin) * built_in[first]:
            raise NotBetter(
                f"no better grid was found: the best has an error of {lowest:.4g} on held-out noises, "
                f"{self.label} on {first} has {built_in[first]:.4g}",
                "a smaller --nfe leaves more to gain",
            )
        return TunedGrid(
            solver=solver.scheduler(first).name,
            nfe=nfe,
            **learned.described(),
            guidance=self.guidance,
            model=self.subject.name,
            model_hash=self.subject.model_hash,
            error=lowest,
            built_in=BuiltIn(first, built_in[first], built_in),
            ratio=lowest / built_in[first],
            validation=tuple(validation),
            settings=settings,
            versions=versions(),
        )

    def _search(
        self,
        learned: Learned,
        on_step: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Check]:
        """Leave in `learned` the best parameters on the held-out noises; return the course of their error."""
        settings = self.settings
        parameters = [parameter for parameter in learned.parameters() if parameter.requires_grad]
        optimiser = torch.optim.LBFGS(
            parameters,
            max_iter=settings.iterations,
            max_eval=settings.iterations,
            history_size=settings.iterations,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        checks: list[Check] = []
        best: list[Tensor] = []

        def check(done: int) -> None:
            """Raises Enough if the last checks found nothing better."""
            try:
                error = self.solver.error(learned.grid(), self.test)
            except NonFinite:
                error = NOT_FINITE
            if not checks or error < min(earlier.error for earlier in checks):
                best[:] = [parameter.detach().clone() for parameter in parameters]
            checks.append(Check(done, error))
            lowest = min(range(len(checks)), key=lambda i: checks[i].error)
            if len(checks) - 1 - lowest >= settings.patience:
                raise Enough

        done = 0

        def closure() -> float:
            nonlocal done
            if done % settings.every == 0:
                check(done)
            done += 1
            optimiser.zero_grad()
            loss = self.solver.learn(learned, self.train, settings.batch)
            if on_step is not None:
                on_step(min(done, settings.iterations), settings.iterations)
            if stop is not None and stop():
                raise Enough
            return loss

        with contextlib.suppress(Enough):
            optimiser.step(closure)
            check(done)
        with torch.no_grad():
            for parameter, value in zip(parameters, best, strict=True):
                parameter.copy_(value)
        return checks


class Enough(Exception):  # noqa: N818
    """The search ends."""


class SolverOnModel:
    """One solver on one model at one guidance scale: its starts, solutions and errors."""

    def __init__(self, subject: Subject, label: str, guidance: float) -> None:
        self.subject, self.label, self.guidance = subject, label, guidance
        self._built: dict[str, schedulers.Scheduler] = {}

        @functools.lru_cache(maxsize=128)  # the batches are always the same ones
        def network(prompts: tuple[str, ...]) -> Network:
            return subject.network(prompts, guidance)

        self.network = network

    def scheduler(self, grid: str) -> schedulers.Scheduler:
        """The solver on a grid."""
        if grid not in self._built:
            entry = Entry(self.label, schedulers.parse(self.label).name, grid)
            self._built[grid] = entry.build(self.subject)
        return self._built[grid]

    def starts(self, seeds: Sequence[int], prompt_of: Callable[[int], str]) -> Starts:
        """The starts of these seeds, without solutions."""
        parts = [self.subject.start(seed)[0] for seed in seeds]
        prompts = [prompt_of(seed) for seed, part in zip(seeds, parts, strict=True) for _ in range(len(part))]
        return Starts(torch.cat(parts), list(seeds), prompts)

    @torch.no_grad()
    def teacher(self, starts: Starts, nfe: int) -> Tensor:
        """The exact solution, or that of a good solver with many evaluations."""
        exact = self.subject.exact(starts.x)
        if exact is not None:
            return exact
        scheduler = parse_entries([AUTOMATIC], noise=self.subject.noise)[0].build(self.subject)
        return self.sampled(scheduler, scheduler.grid(scheduler.steps_for(nfe)), starts)

    def built_in(self, nfe: int, starts: Starts) -> dict[str, float]:
        """The error of every built-in grid that allows exactly so many evaluations."""
        errors = {}
        for name in schedulers.grid_names():
            try:
                scheduler = self.scheduler(name)
                errors[name] = self.error(scheduler.grid(_steps(scheduler, nfe)), starts)
            except (ValueError, ArithmeticError):  # a grid that does not fit this schedule or number of steps
                continue
        return errors

    @torch.no_grad()
    def error(self, grid: Grid, starts: Starts) -> float:
        """The mean error over the seeds."""
        return float(starts.errors(self.sampled(self.scheduler("karras"), grid, starts)).mean())

    def learn(self, learned: Learned, starts: Starts, size: int) -> float:
        """The mean error over the seeds; adds its gradient to that of the parameters, `size` seeds at a time."""
        total, size = 0.0, len(starts.seeds) if self.subject.is_mixture else size
        for first in range(0, len(starts.seeds), size):
            batch = starts.part(range(first, min(first + size, len(starts.seeds))))
            try:
                result = self.sampled(self.scheduler("karras"), learned.grid(), batch, gradients=True)
            except NonFinite:
                for parameter in learned.parameters():
                    parameter.grad = None
                return NOT_FINITE
            loss = batch.errors(result).sum() / len(starts.seeds)
            loss.backward()
            total += float(loss.detach())
        for parameter in learned.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        return total

    def sampled(self, scheduler: schedulers.Scheduler, grid: Grid, starts: Starts, gradients: bool = False) -> Tensor:
        """The results [S·B, …] in batches, on the CPU."""
        results = []
        size = len(starts.x) if self.subject.is_mixture or gradients else BATCH
        for first in range(0, len(starts.x), size):
            rows = slice(first, first + size)
            network = self.network(tuple(starts.prompts[rows]))
            x = scheduler.start(starts.x[rows].to(self.subject.device, self.subject.dtype), grid)
            model = functools.partial(checkpoint, network, use_reentrant=False) if gradients else network
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(scheduler.sample(model, x, grid).cpu())
        return torch.cat(results)


def _steps(scheduler: schedulers.Scheduler, nfe: int) -> int:
    """The steps that take exactly so many evaluations. Raises ValueError."""
    steps = scheduler.steps_for(nfe)
    if scheduler.nfe(steps) != nfe:
        raise ValueError(f"{scheduler.name} cannot make exactly {nfe} evaluations")
    return steps


def solve(subject: Subject, entry: Entry | None, grid: TunedGrid, seed: int, prompt: str) -> Image.Image:
    """The picture of a start by an entry with as many evaluations as the grid has; None is the teacher."""
    solver = SolverOnModel(subject, grid.solver, grid.guidance)
    starts = solver.starts([seed], lambda _: prompt)
    if entry is None:
        return subject.picture(solver.teacher(starts, grid.settings.teacher))
    scheduler = entry.build(subject)
    with torch.no_grad():
        return subject.picture(solver.sampled(scheduler, scheduler.grid(_steps(scheduler, grid.nfe)), starts))


def as_json(grid: TunedGrid) -> str:
    """The text of the grid file."""
    return json.dumps(grid.to_json(), indent=1, allow_nan=False) + "\n"
