"""Learn at which times a solver should ask a model, by differentiating through the ordinary solver.

What is learned, for one model, solver, NFE and guidance: the noise levels of the grid; the times that the network is
told at them; and, for a solver that asks once a step, corrections of its coefficients: a gain for the latest answer,
and how much of up to four earlier ones is brought in. All begin at the best built-in grid, uncorrected. The loss is the
distance to a teacher, the same ODE solved with very many evaluations (or exactly), from the same noises; the best on
held-out noises is kept. There are few parameters and one set of noises, so L-BFGS on all of them at once needs fewer
evaluations than Adam. Ideas: Watson et al. 2021 (2106.03802), LD3 (Tong et al. 2024, 2405.15506), S4S (Frankel et al.
2025, 2502.17423).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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

from .plan import HELD_OUT, SEEDS_BELOW, Entry, is_stochastic
from .run import AUTOMATIC, versions
from .subjects import Network, Subject

SCHEMA = "diffgen.grid/1"
EARLIER = 4  # steps whose answers a correction brings in besides the latest
BATCH = 16  # examples in one call of a network, where no gradients are kept
FAR = 1e9  # the loss of parameters whose result is not finite


class NotBetter(DiffgenError):  # noqa: N818
    """Nothing better than the built-in grids was found."""


@dataclass(frozen=True)
class Settings:
    """How the search is done."""

    iterations: int = 160  # at most so many evaluations of the loss and its gradient
    noises: int = 32  # to learn from; seeds 0, 1, …
    held_out: int = HELD_OUT  # to choose by; seeds just below SEEDS_BELOW
    batch: int = 8  # noises in one call of the network where gradients are kept; of the mixture all
    every: int = 8  # iterations between two looks at the held-out noises
    patience: int = 3  # looks without a better value before it stops
    margin: float = 0.05  # by which it must be better than the best built-in grid
    teacher: int = 128  # evaluations of the teacher


@dataclass
class Starts:
    """Noises of some seeds, what is to be shown from each, and where the teacher leads."""

    x: Tensor  # [S·B, …], standard normal
    seeds: list[int]
    prompts: list[str]  # one for each row of x
    aim: Tensor = field(default_factory=lambda: torch.empty(0))

    def part(self, indices: Sequence[int]) -> Starts:
        """Those of some of the seeds."""
        size = len(self.x) // len(self.seeds)
        rows = torch.cat([torch.arange(i * size, (i + 1) * size) for i in indices])
        aim = self.aim[rows] if len(self.aim) else self.aim
        return Starts(self.x[rows], [self.seeds[i] for i in indices], [self.prompts[r] for r in rows.tolist()], aim)

    def errors(self, result: Tensor) -> Tensor:
        """The root-mean-square distance to the teacher for each seed, [S]."""
        return (result - self.aim).reshape(len(self.seeds), -1).square().mean(1).sqrt()


class Learned(torch.nn.Module):
    """The parameters, and the grid that they mean.

    Levels: the part of the way in λ = ln(α/σ) from the first level to the least noise, as a softmax of increments, so
    that they always fall. Times told: an offset from the level's own, in hundredths of T. Corrections: as they are.
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
        self.told = torch.nn.Parameter(torch.zeros(len(start), dtype=torch.float64))
        columns = 1 + min(len(start) - 1, EARLIER)
        self.corrections = torch.nn.Parameter(
            torch.zeros(len(start), columns, dtype=torch.float64), requires_grad=corrections
        )

    def points(self) -> list[Point]:
        """The points at which to ask, their numbers 0-d tensors that carry gradients."""
        way = torch.softmax(self.gaps, 0).cumsum(0)[:-1]
        levels = self.top + (self.bottom - self.top) * way
        points = [self.start[0], *(self.noise.at(lam=level) for level in levels)]
        last = float(self.noise.t_max)
        shift = self.told * (self.noise.T / 100)
        return [replace(p, t=(p.t + s).clamp(0.0, last)) for p, s in zip(points, shift, strict=True)]

    def grid(self) -> Grid:
        corrections: Any = self.corrections if self.corrections.requires_grad else ()
        return Grid([*self.points(), CLEAN], self.noise, corrections=corrections)

    @torch.no_grad()
    def described(self) -> dict[str, Any]:
        """What a grid file says of them."""
        points = self.points()
        levels = [float(self.noise.level(p)) for p in points]
        said: dict[str, Any] = (
            {"sigmas": levels} if math.isfinite(levels[0]) else {"times": [self._time(p) for p in points]}
        )
        said["model_times"] = [float(p.t) for p in points]
        if self.corrections.requires_grad:
            rows = [[round(c, 8) for c in row] for row in self.corrections.tolist()]
            said["gains"] = [row[0] for row in rows]
            if len(rows) > 1:
                said["corrections"] = [row[1:] for row in rows]
        return said

    def _time(self, p: Point) -> float:
        """The time of the level itself, whatever the network is told there."""
        return float(self.noise.t_max if p.alpha == 0 else self.noise.at(lam=float(p.lam)).t)


def tune(
    subject: Subject,
    label: str,
    nfe: int,
    prompt_of: Callable[[int], str],
    guidance: float = 1.0,
    settings: Settings = Settings(),
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The content of a grid file, with the curve of the search and what it is compared with.

    `prompt_of(seed)` says what is shown from that seed. Raises NotBetter, and ValueError for a scheduler that cannot be
    tuned (it draws noise, or does not ask `nfe` times exactly).
    """
    return Tuner(subject, label, prompt_of, guidance, settings).tune(nfe, on_step)


class Tuner:
    """One solver on one model at one guidance scale. The teacher's solutions serve every NFE that is tuned."""

    def __init__(
        self,
        subject: Subject,
        label: str,
        prompt_of: Callable[[int], str],
        guidance: float = 1.0,
        settings: Settings = Settings(),
    ) -> None:
        """Raises ValueError for a scheduler that draws noise or has options of its own, and for too many noises."""
        if is_stochastic(label):
            raise ValueError(f"{label} draws noise on the way: it has no solution that its grid could come nearer to")
        solver = schedulers.info(label)
        if solver.options | schedulers.parse(label).options != solver.options:
            raise ValueError(f"{label} is {solver.name} with other options, which a grid file does not say")
        if settings.noises + settings.held_out > SEEDS_BELOW:
            raise ValueError(
                f"of {SEEDS_BELOW} noises {settings.held_out} are held out: {settings.noises} are too many"
            )
        self.subject, self.label, self.guidance, self.settings = subject, label, guidance, settings
        self.solver = SolverOnModel(subject, label, guidance)
        self.train = self.solver.starts(range(settings.noises), prompt_of)
        self.test = self.solver.starts(range(SEEDS_BELOW - settings.held_out, SEEDS_BELOW), prompt_of)

    def tune(self, nfe: int, on_step: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """See `tune`."""
        solver, settings = self.solver, self.settings
        steps = solver.scheduler("karras").steps_for(nfe)
        if (asked := solver.scheduler("karras").nfe(steps)) != nfe:
            raise ValueError(f"{self.label} cannot ask exactly {nfe} times; it asks {asked} times")
        for starts in (self.train, self.test):
            if not len(starts.aim):
                starts.aim = solver.teacher(starts, settings.teacher)
        built_in = solver.built_in(nfe, self.test)
        first = min(built_in, key=lambda name: built_in[name])
        once = schedulers.info(schedulers.parse(self.label).name).evaluations_per_step == 1
        points = solver.scheduler(first).grid(steps).points[:-1]
        learned = Learned(self.subject.noise, points, corrections=once and len(points) == nfe)
        curve = self._search(learned, on_step)
        lowest = min(look["error"] for look in curve)
        if not lowest <= (1 - settings.margin) * built_in[first]:
            raise NotBetter(
                f"nothing better was found: the best grid has an error of {lowest:.4g} on held-out noises, "
                f"{self.label} on {first} has {built_in[first]:.4g}",
                "a smaller --nfe leaves more to gain",
            )
        return {
            "schema": SCHEMA,
            "solver": solver.scheduler(first).name,
            "nfe": nfe,
            **learned.described(),
            "guidance": self.guidance,
            "model": self.subject.name,
            "model_hash": self.subject.model_hash,
            "error": lowest,
            "built_in": {"grid": first, "error": built_in[first], "all": built_in},
            "ratio": lowest / built_in[first],
            "validation": curve,
            "settings": vars(settings),
            "versions": versions(),
        }

    def _search(self, learned: Learned, on_step: Callable[[int, int], None] | None) -> list[dict[str, float]]:
        """Leave in `learned` what is best on the held-out noises; returns how good it was at each look."""
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
        curve: list[dict[str, float]] = []
        kept: list[Tensor] = []

        def look(done: int) -> None:
            """Raises Enough where the last looks have found nothing better."""
            try:
                error = self.solver.error(learned.grid(), self.test)
            except NonFinite:
                error = FAR
            if not curve or error < min(before["error"] for before in curve):
                kept[:] = [parameter.detach().clone() for parameter in parameters]
            curve.append({"iteration": done, "error": error})
            best = min(range(len(curve)), key=lambda i: curve[i]["error"])
            if len(curve) - 1 - best >= settings.patience:
                raise Enough

        done = 0

        def closure() -> float:
            nonlocal done
            if done % settings.every == 0:
                look(done)
            done += 1
            optimiser.zero_grad()
            loss = self.solver.learn(learned, self.train, settings.batch)
            if on_step is not None:
                on_step(min(done, settings.iterations), settings.iterations)
            return loss

        with contextlib.suppress(Enough):
            optimiser.step(closure)
            look(done)
        with torch.no_grad():
            for parameter, best in zip(parameters, kept, strict=True):
                parameter.copy_(best)
        return curve


class Enough(Exception):  # noqa: N818
    """The search gets no further."""


class SolverOnModel:
    """One solver on one model: what the search asks of both."""

    def __init__(self, subject: Subject, label: str, guidance: float) -> None:
        self.subject, self.label, self.guidance = subject, label, guidance
        self._built: dict[str, schedulers.Scheduler] = {}

        @functools.lru_cache(maxsize=128)  # the batches are always the same ones
        def network(prompts: tuple[str, ...]) -> Network:
            return subject.network(prompts, guidance)

        self.network = network

    def scheduler(self, grid: str) -> schedulers.Scheduler:
        if grid not in self._built:
            entry = Entry(self.label, schedulers.parse(self.label).name, grid)
            self._built[grid] = entry.build(self.subject)
        return self._built[grid]

    def starts(self, seeds: Sequence[int], prompt_of: Callable[[int], str]) -> Starts:
        parts = [self.subject.start(seed)[0] for seed in seeds]
        prompts = [prompt_of(seed) for seed, part in zip(seeds, parts, strict=True) for _ in range(len(part))]
        return Starts(torch.cat(parts), list(seeds), prompts)

    @torch.no_grad()
    def teacher(self, starts: Starts, nfe: int) -> Tensor:
        """The exact solution, or that of a good solver with many evaluations."""
        exact = self.subject.exact(starts.x)
        if exact is not None:
            return exact
        entry = AUTOMATIC[0]
        scheduler = entry.build(self.subject)
        return self.sampled(scheduler, scheduler.grid(scheduler.steps_for(nfe)), starts)

    def built_in(self, nfe: int, starts: Starts) -> dict[str, float]:
        """The error of every built-in grid that can do with exactly so many evaluations."""
        found = {}
        for name in schedulers.grid_names():
            try:
                scheduler = self.scheduler(name)
                found[name] = self.error(scheduler.grid(_steps(scheduler, nfe)), starts)
            except (ValueError, ArithmeticError):  # a grid that this schedule or number of steps has not
                continue
        return found

    @torch.no_grad()
    def error(self, grid: Grid, starts: Starts) -> float:
        """The mean over the seeds."""
        return float(starts.errors(self.sampled(self.scheduler("karras"), grid, starts)).mean())

    def learn(self, learned: Learned, starts: Starts, size: int) -> float:
        """The mean error over the seeds, its gradient added to that of the parameters, `size` seeds at a time."""
        total, size = 0.0, len(starts.seeds) if self.subject.is_mixture else size
        for first in range(0, len(starts.seeds), size):
            some = starts.part(range(first, min(first + size, len(starts.seeds))))
            try:
                result = self.sampled(self.scheduler("karras"), learned.grid(), some, gradients=True)
            except NonFinite:
                for parameter in learned.parameters():
                    parameter.grad = None
                return FAR
            part = some.errors(result).sum() / len(starts.seeds)
            part.backward()
            total += float(part.detach())
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
            asked = functools.partial(checkpoint, network, use_reentrant=False) if gradients else network
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(scheduler.sample(asked, x, grid).cpu())
        return torch.cat(results)


def _steps(scheduler: schedulers.Scheduler, nfe: int) -> int:
    """The steps that cost exactly so many evaluations. Raises ValueError."""
    steps = scheduler.steps_for(nfe)
    if scheduler.nfe(steps) != nfe:
        raise ValueError(f"{scheduler.name} cannot ask exactly {nfe} times")
    return steps


def solve_as(subject: Subject, entry: Entry | None, found: dict[str, Any], seed: int, prompt: str) -> Image.Image:
    """The picture of a start by an entry at the grid's budget; None is the teacher."""
    solver = SolverOnModel(subject, found["solver"], found["guidance"])
    starts = solver.starts([seed], lambda _: prompt)
    if entry is None:
        return subject.picture(solver.teacher(starts, found["settings"]["teacher"]))
    scheduler = entry.build(subject)
    with torch.no_grad():
        return subject.picture(solver.sampled(scheduler, scheduler.grid(_steps(scheduler, found["nfe"])), starts))


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, allow_nan=False) + "\n"
