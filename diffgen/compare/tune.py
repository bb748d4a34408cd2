"""Learn at which times a solver should ask a model, by differentiating through the ordinary solver.

What is learned, for one model, solver, NFE and guidance: the noise levels of the grid; the times that the network is
told at them; and, for a solver that asks once a step, two corrections of its coefficients for each step. All begin at
the best built-in grid, without correction. The loss is the distance to a teacher, the same ODE solved with very many
evaluations (or exactly), from the same noises; the best on held-out noises is kept. Ideas: Watson et al. 2021
(2106.03802), LD3 (Tong et al. 2024, 2405.15506), S4S (Frankel et al. 2025, 2502.17423).
"""

from __future__ import annotations

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
from schedulers.grids import Grid
from schedulers.noise import CLEAN, NoiseSchedule, Point

from .plan import Entry, is_stochastic
from .run import AUTOMATIC, versions
from .subjects import Network, Subject

SCHEMA = "diffgen.grid/1"
SEEDS_BELOW = 800  # tuning draws its noises from seeds below, so that those from there on have never been seen


class NotBetter(DiffgenError):  # noqa: N818
    """Nothing better than the built-in grids was found."""


@dataclass(frozen=True)
class Settings:
    """How the search is done."""

    iterations: int = 240
    noises: int = 64  # to learn from; seeds 0, 1, …
    held_out: int = 32  # to choose by; seeds just below SEEDS_BELOW
    batch: int = 16  # noises in one iteration
    learning_rate: float = 0.05
    every: int = 10  # iterations between two looks at the held-out noises
    patience: int = 8  # looks without a better value before it stops
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
        self.corrections = torch.nn.Parameter(torch.zeros(len(start), 2), requires_grad=corrections)

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
        flow = self.noise.name == "flow"
        said: dict[str, Any] = {
            "sigmas" if self.start[0].alpha != 0 or flow else "times": [
                float(p.sigma if flow else p.rho) if self.start[0].alpha != 0 or flow else self._time(p) for p in points
            ],
            "model_times": [float(p.t) for p in points],
        }
        if self.corrections.requires_grad:
            said["corrections"] = [[round(c, 8) for c in row] for row in self.corrections.tolist()]
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
    if is_stochastic(label):
        raise ValueError(f"{label} draws noise on the way: it has no solution that its grid could come nearer to")
    if settings.noises + settings.held_out > SEEDS_BELOW:
        raise ValueError(f"of {SEEDS_BELOW} noises {settings.held_out} are held out: {settings.noises} are too many")
    base = _Solver(subject, label, guidance)
    steps = base.scheduler("karras").steps_for(nfe)
    if base.scheduler("karras").nfe(steps) != nfe:
        raise ValueError(f"{label} cannot ask exactly {nfe} times; it asks {base.scheduler('karras').nfe(steps)} times")
    train = base.starts(range(settings.noises), prompt_of)
    test = base.starts(range(SEEDS_BELOW - settings.held_out, SEEDS_BELOW), prompt_of)
    for starts in (train, test):
        starts.aim = base.teacher(starts, settings.teacher)
    built_in = base.built_in(nfe, train)
    best = min(built_in, key=lambda name: built_in[name])
    baseline = {
        name: base.error(base.scheduler(name).grid(_steps(base.scheduler(name), nfe)), test) for name in built_in
    }
    known = min(baseline.values())

    once = schedulers.info(schedulers.parse(label).name).evaluations_per_step == 1
    points = base.scheduler(best).grid(steps).points[:-1]
    learned = Learned(subject.noise, points, corrections=once and len(points) == nfe)
    optimiser = torch.optim.Adam(
        [
            {"params": [learned.gaps], "lr": settings.learning_rate},
            {"params": [learned.told], "lr": settings.learning_rate},
            {"params": [learned.corrections], "lr": settings.learning_rate / 3},
        ]
    )
    rates = [group["lr"] for group in optimiser.param_groups]
    order = torch.Generator().manual_seed(0)
    curve = [{"iteration": 0, "error": base.error(learned.grid(), test)}]
    kept = {name: value.detach().clone() for name, value in learned.state_dict().items()}
    lowest, waited = curve[0]["error"], 0
    for iteration in range(1, settings.iterations + 1):
        part = torch.randperm(len(train.seeds), generator=order)[: settings.batch].tolist()
        fade = 0.5 * (1 + math.cos(math.pi * (iteration - 1) / settings.iterations))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, iteration / 10) * fade
        base.learn(learned, train.part(part), optimiser)
        if on_step is not None:
            on_step(iteration, settings.iterations)
        if iteration % settings.every == 0 or iteration == settings.iterations:
            error = base.error(learned.grid(), test)
            curve.append({"iteration": iteration, "error": error})
            waited += 1
            if error < lowest:
                lowest, waited = error, 0
                kept = {name: value.detach().clone() for name, value in learned.state_dict().items()}
            if waited >= settings.patience:
                break
    learned.load_state_dict(kept)
    first = min(baseline, key=lambda name: baseline[name])
    if not lowest <= (1 - settings.margin) * known:
        raise NotBetter(
            f"nothing better was found: the best grid has an error of {lowest:.4g} on held-out noises, "
            f"{label} on {first} has {known:.4g}",
            "a smaller --nfe leaves more to gain",
        )
    return {
        "schema": SCHEMA,
        "solver": base.scheduler(best).name,
        "nfe": nfe,
        **learned.described(),
        "guidance": guidance,
        "model": subject.name,
        "model_hash": subject.model_hash,
        "error": lowest,
        "built_in": {"grid": first, "error": known, "all": baseline},
        "ratio": lowest / known,
        "validation": curve,
        "settings": vars(settings),
        "versions": versions(),
    }


class _Solver:
    """One solver on one model: what the search asks of both."""

    def __init__(self, subject: Subject, label: str, guidance: float) -> None:
        self.subject, self.label, self.guidance = subject, label, guidance
        self._built: dict[str, schedulers.Scheduler] = {}

        @functools.lru_cache(maxsize=16)  # those of the held-out noises; every part to learn from is another
        def network(prompts: tuple[str, ...]) -> Network:
            return subject.network(prompts, guidance)

        self._network = network

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

    def learn(self, learned: Learned, starts: Starts, optimiser: torch.optim.Optimizer) -> None:
        """One step of Adam, the gradient summed over slices of the batch that are small enough for the memory."""
        optimiser.zero_grad()
        size = len(starts.seeds) if self.subject.family == "mixture" else SLICE
        for first in range(0, len(starts.seeds), size):
            some = starts.part(range(first, min(first + size, len(starts.seeds))))
            errors = some.errors(self.sampled(self.scheduler("karras"), learned.grid(), some, gradients=True))
            (errors.sum() / len(starts.seeds)).backward()
        for parameter in learned.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimiser.step()

    def sampled(self, scheduler: schedulers.Scheduler, grid: Grid, starts: Starts, gradients: bool = False) -> Tensor:
        """The results [S·B, …] in batches, on the CPU."""
        results = []
        size = len(starts.x) if self.subject.family == "mixture" else BATCH
        for first in range(0, len(starts.x), size):
            rows = slice(first, first + size)
            network = self._network(tuple(starts.prompts[rows]))
            x = starts.x[rows].to(self.subject.device, self.subject.dtype) * math.hypot(grid[0].alpha, grid[0].sigma)
            asked = functools.partial(checkpoint, network, use_reentrant=False) if gradients else network
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(scheduler.sample(asked, x, grid).cpu())
        return torch.cat(results)


BATCH, SLICE = 16, 4  # examples in one call of a network; the same where gradients are kept


def _steps(scheduler: schedulers.Scheduler, nfe: int) -> int:
    """The steps that cost exactly so many evaluations. Raises ValueError."""
    steps = scheduler.steps_for(nfe)
    if scheduler.nfe(steps) != nfe:
        raise ValueError(f"{scheduler.name} cannot ask exactly {nfe} times")
    return steps


def solve_as(subject: Subject, entry: Entry | None, found: dict[str, Any], seed: int, prompt: str) -> Image.Image:
    """The picture of a start by an entry at the grid's budget; None is the teacher."""
    solver = _Solver(subject, found["solver"], found["guidance"])
    starts = solver.starts([seed], lambda _: prompt)
    if entry is None:
        return subject.picture(solver.teacher(starts, found["settings"]["teacher"]))
    scheduler = entry.build(subject)
    with torch.no_grad():
        return subject.picture(solver.sampled(scheduler, scheduler.grid(_steps(scheduler, found["nfe"])), starts))


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, allow_nan=False) + "\n"
