"""The plan of a comparison: every combination of the axes is a cell, with the most steps that its budget allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.generation.checks import MAX_SEED, parse_numbers
from diffgen.generation.grid_files import check_grid, check_grid_model
from diffgen.images.metadata import base_name
from schedulers.explicit import is_grid_file

MAX_CELLS = 20_000
MAX_BUDGET = 10_000
SEEDS_BELOW = 800  # tuning takes its noises from seeds below this, so that the seeds from here on stay unseen
HELD_OUT = 32  # the last of those seeds: tuning selects by them and does not learn from them
SETS = {
    "fast": "euler,dpmpp_2m,deis,unipc",
    "all": "euler,heun,dpm2,dpmpp_2m,dpmpp_2s,dpmpp_3m,deis,unipc,lms,ipndm,res_multistep,pndm,"
    "euler_ancestral,dpmpp_2m_sde,dpmpp_sde,ddpm",
}  # names for several schedulers


class ModelSpec(Protocol):
    """What a scheduler must know about the model."""

    name: str
    model_hash: str
    noise: schedulers.NoiseSchedule
    prediction: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A scheduler on a grid."""

    label: str  # the name as requested, with its options
    scheduler: str  # the canonical name
    grid: str  # a name, or the path of a grid file

    @property
    def grid_name(self) -> str:
        """The name of the grid; of a file its base name."""
        return base_name(self.grid)

    @property
    def stochastic(self) -> bool:
        """True if it draws noise, so that it has no fixed solution."""
        return is_stochastic(self.label)

    def build(self, model: ModelSpec) -> schedulers.Scheduler:
        """The scheduler for a model. Raises ValueError if they do not fit, InputError for a grid of another model."""
        check_grid_model(self.grid, model.name, model.model_hash)
        return schedulers.get(
            self.label, noise=model.noise, prediction=model.prediction, grid=self.grid, **model.options
        )


@dataclass(frozen=True)
class Cell:
    """One picture of the comparison. `steps` and `nfe` are None if it cannot be made; `failure` is the reason."""

    entry: Entry
    budget: int
    steps: int | None
    nfe: int | None
    seed: int
    prompt: str
    guidance: float
    failure: Exception | None = None


@dataclass(frozen=True)
class Axes:
    """The values of every axis. A budget is a number of function evaluations (NFE)."""

    entries: tuple[Entry, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    guidance: tuple[float, ...]

    def cells(self, model: ModelSpec) -> list[Cell]:
        """All cells. The schedulers take turns, so that a slow minute of the machine affects them alike.

        Each solver gets the most steps that the budget allows. Raises UsageError for too many cells.
        """
        count = len(self.entries) * len(self.budgets) * len(self.seeds) * len(self.prompts) * len(self.guidance)
        if count > MAX_CELLS:
            raise UsageError(f"{count} cells are too many; the most is {MAX_CELLS}", "leave some values out")
        paid = {(e, b): _paid(e, b, model) for e in self.entries for b in self.budgets}
        return [
            Cell(entry, budget, *paid[entry, budget][:2], seed, prompt, guidance, paid[entry, budget][2])
            for prompt in self.prompts
            for guidance in self.guidance
            for seed in self.seeds
            for budget in self.budgets
            for entry in self.entries
        ]

    def starts(self) -> Iterator[tuple[int, str, float]]:
        """Every (seed, prompt, guidance): each has one solution, which the cells approach."""
        for prompt in self.prompts:
            for guidance in self.guidance:
                for seed in self.seeds:
                    yield seed, prompt, guidance


def is_stochastic(label: str) -> bool:
    """True if this scheduler draws noise; with the option eta = 0 it draws none."""
    name, _, options = schedulers.parse(label)
    solver = schedulers.info(name)
    eta = (solver.options | options).get("eta", 1)
    return solver.stochastic and bool(eta)


def parse_entries(
    labels: Sequence[str], grid_names: Sequence[str] = (), noise: schedulers.NoiseSchedule | None = None
) -> tuple[Entry, ...]:
    """Every scheduler on every grid; without grids each on its own (the one in its name, else its default).

    The default grid depends on the model's noise schedule, if that is known.

    Raises UsageError for an unknown name, InputError for a broken grid file.
    """
    entries: dict[tuple[str, str], Entry] = {}
    for label in labels:
        try:
            name, own, options = schedulers.parse(label)
        except schedulers.UnknownName as error:
            raise UsageError(str(error), "list: diffgen schedulers list") from error
        solver = schedulers.info(name)
        if solver.native_only or solver.upwards or solver.cfg_pp:
            raise UsageError(f"{name} {solver.unlike_the_ode}: it cannot be compared at a budget")
        default = solver.grid if noise is None else solver.grid_for(noise)
        for grid in grid_names or [own or default]:
            grid = check_grid(grid)
            entries.setdefault(
                (name + repr(sorted(options.items())), grid), Entry(label if options else name, name, grid)
            )
    files = {entry.grid for entry in entries.values() if is_grid_file(entry.grid)}
    if len({base_name(file) for file in files}) < len(files):
        raise UsageError("two grid files have the same name: give them different ones")
    if not entries:
        raise UsageError("there is no scheduler to compare", "for example --schedulers euler,dpmpp_2m,unipc")
    return tuple(entries.values())


def parse_budgets(text: str) -> tuple[int, ...]:
    """Budgets from "5,10,20", sorted. Raises UsageError."""
    return tuple(sorted(parse_numbers("--nfe", text, 1, MAX_BUDGET, MAX_CELLS)))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "0-7" or "1,5". Raises UsageError."""
    return parse_numbers("--seeds", text, 0, MAX_SEED, MAX_CELLS)


def parse_guidance(text: str) -> tuple[float, ...]:
    """Guidance scales from "3,5". Raises UsageError."""
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--guidance must be numbers, like 3,5 (got {text!r})") from error
    if not all(0 <= value <= 100 for value in values):
        raise UsageError(f"--guidance must be from 0 to 100 (got {text!r})", "1 is off")
    return values


def _paid(entry: Entry, budget: int, model: ModelSpec) -> tuple[int | None, int | None, Exception | None]:
    """(steps, evaluations, None) for a budget, or (None, None, the reason why there are none)."""
    try:
        scheduler = entry.build(model)
        steps = scheduler.steps_for(budget)
        return steps, scheduler.nfe(steps), None
    except (ValueError, InputError) as error:
        return None, None, error
