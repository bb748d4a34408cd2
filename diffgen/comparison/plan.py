"""What is compared: every combination of the axes as a cell, with the steps that its budget pays for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.generation.checks import MAX_SEED, parse_numbers
from diffgen.generation.grid_files import check_grid, check_grid_model
from diffgen.images.metadata import base_name
from schedulers.explicit import is_grid_file

MAX_CELLS = 20_000
MAX_BUDGET = 10_000
SEEDS_BELOW = 800  # tuning draws its noises from seeds below, so that those from there on have never been seen
HELD_OUT = 32  # the last of those seeds: tuning chooses by them, and learns nothing from them


class Asked(Protocol):
    """What a scheduler must know of the model that it asks."""

    name: str
    model_hash: str
    noise: schedulers.NoiseSchedule
    prediction: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: a scheduler on a grid, as it was asked for."""

    label: str
    scheduler: str  # canonical
    grid: str  # a name, or the path of a grid file

    @property
    def grid_name(self) -> str:
        """A grid from a file is called by its base name."""
        return base_name(self.grid)

    @property
    def stochastic(self) -> bool:
        """Does it draw noise on the way, so that no single solution is what it aims at?"""
        return is_stochastic(self.label)

    def build(self, model: Asked) -> schedulers.Scheduler:
        """The scheduler for a model. Raises ValueError where they do not go together, InputError for another's grid."""
        check_grid_model(self.grid, model.name, model.model_hash)
        return schedulers.get(
            self.label, noise=model.noise, prediction=model.prediction, grid=self.grid, **model.options
        )


@dataclass(frozen=True)
class Cell:
    """One picture of the comparison. `steps` and `nfe` are None where the budget pays for none: `failure` says why."""

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
    """What was asked for. A budget is a number of function evaluations (NFE)."""

    entries: tuple[Entry, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    guidance: tuple[float, ...]

    def cells(self, model: Asked) -> list[Cell]:
        """All of them, interleaved: the schedulers take turns, so that a slow minute of the machine hits them alike.

        Each solver gets the most steps that the budget pays for. Raises UsageError if there are too many.
        """
        count = len(self.entries) * len(self.budgets) * len(self.seeds) * len(self.prompts) * len(self.guidance)
        if count > MAX_CELLS:
            raise UsageError(f"{count} cells are too many; at most {MAX_CELLS} are compared", "leave some values out")
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
        """(seed, prompt, guidance): what has one solution, which the cells approach."""
        for prompt in self.prompts:
            for guidance in self.guidance:
                for seed in self.seeds:
                    yield seed, prompt, guidance

    def asdict(self) -> dict[str, Any]:
        said = asdict(self)
        for entry, shown in zip(self.entries, said["entries"], strict=True):
            info = schedulers.info(entry.scheduler)
            shown |= {
                "grid": entry.grid_name,
                "stochastic": entry.stochastic,
                "order": info.order,
                "evaluations_per_step": info.evaluations_per_step,
            }
        return json.loads(json.dumps(said))


def is_stochastic(label: str) -> bool:
    """Does this scheduler draw noise? Of those with an amount of it as an option, none at 0."""
    name, _, options = schedulers.parse(label)
    solver = schedulers.info(name)
    eta = (solver.options | options).get("eta", 1)
    return solver.stochastic and bool(eta)


def parse_entries(labels: Sequence[str], grid_names: Sequence[str] = ()) -> tuple[Entry, ...]:
    """Every scheduler on every grid; without grids each on its own (the one in its name, else its default).

    Raises UsageError for an unknown name, and InputError for a grid file that is none.
    """
    found: dict[tuple[str, str], Entry] = {}
    for label in labels:
        try:
            name, own, options = schedulers.parse(label)
        except schedulers.UnknownName as error:
            raise UsageError(str(error), "list: diffgen schedulers list") from error
        solver = schedulers.info(name)
        if solver.native_only:
            raise UsageError(f"{name} chooses its own number of evaluations: it cannot be held to a budget")
        if solver.upwards:
            raise UsageError(f"{name} goes from a picture to noise: it cannot be compared")
        for grid in grid_names or [own or solver.grid]:
            grid = check_grid(grid)
            found.setdefault(
                (name + repr(sorted(options.items())), grid), Entry(label if options else name, name, grid)
            )
    files = {entry.grid for entry in found.values() if is_grid_file(entry.grid)}
    if len({base_name(file) for file in files}) < len(files):
        raise UsageError("two grid files have the same name: give them different ones")
    if not found:
        raise UsageError("there is no scheduler to compare", "for example --schedulers euler,dpmpp_2m,unipc")
    return tuple(found.values())


def parse_budgets(text: str) -> tuple[int, ...]:
    return tuple(sorted(parse_numbers("--nfe", text, 1, MAX_BUDGET, MAX_CELLS)))


def parse_seeds(text: str) -> tuple[int, ...]:
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


def _paid(entry: Entry, budget: int, model: Asked) -> tuple[int | None, int | None, Exception | None]:
    """(steps, evaluations, None) that a budget pays for, or (None, None, why it does not)."""
    try:
        scheduler = entry.build(model)
        steps = scheduler.steps_for(budget)
        return steps, scheduler.nfe(steps), None
    except (ValueError, InputError) as error:
        return None, None, error
