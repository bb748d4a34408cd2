"""The results of a comparison, typed. JSON only at the border: `Results.to_json` and `Results.from_json`.

The metrics of a cell, a row or a reference are a dictionary by the names in `METRICS`; in JSON they are keys beside the
others, so that a new metric needs no new field here.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from diffgen.errors import ExitCode
from diffgen.training.metrics import METRICS

from .metrics import Interval

SCHEMA = "diffgen.compare/1"
Place = tuple[str, str, int, str, float]  # label, grid, budget, prompt, guidance


@dataclass(frozen=True)
class SubjectInfo:
    """The model that was compared on."""

    name: str
    family: str
    hash: str
    noise: str
    prediction: str
    device: str
    dtype: str

    @property
    def is_mixture(self) -> bool:
        """True for the mixture: its answer is known exactly, and its pictures are plots of points."""
        return self.family == "mixture"


@dataclass(frozen=True)
class EntryInfo:
    """A scheduler on a grid."""

    label: str
    scheduler: str
    grid: str
    stochastic: bool
    order: int
    evaluations_per_step: int


@dataclass(frozen=True)
class AxesInfo:
    """The values of every axis."""

    entries: tuple[EntryInfo, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    guidance: tuple[float, ...]


@dataclass(frozen=True)
class StartResult:
    """The reference solution of one start: a seed, a prompt and a guidance scale."""

    seed: int
    prompt: str
    guidance: float
    key: str
    error: float | None  # an estimate of its own error; 0 if it is exact
    nfe: int
    image: str | None
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ReferenceResult:
    """The reference solutions that errors are distances to."""

    kind: str  # none, exact or numerical
    name: str | None
    error: float | None  # the largest of its own errors
    starts: tuple[StartResult, ...]
    reason: str | None = None  # why one could not be computed


@dataclass(frozen=True)
class CellResult:
    """One picture of the comparison."""

    scheduler: str
    label: str
    grid: str
    budget: int
    nfe: int | None  # counted, not computed
    steps: int | None
    seed: int
    prompt: str
    guidance: float
    stochastic: bool
    status: str  # done, failed or missing
    seconds: float | None = None
    seconds_per_nfe: float | None = None
    network_calls: int | None = None  # calls of the network for each example
    peak_memory: int | None = None  # bytes
    metrics: dict[str, float | None] = field(default_factory=dict)
    image: str | None = None  # relative to the folder
    pixels_sha256: str | None = None
    noise_sha256: str | None = None
    reason: str | None = None  # of a failure
    key: str | None = None

    @property
    def error(self) -> float | None:
        """The root-mean-square distance to the reference; None where there is none."""
        return self.metrics.get("error")

    @property
    def place(self) -> Place:
        """The row that it belongs to."""
        return self.label, self.grid, self.budget, self.prompt, self.guidance


@dataclass(frozen=True)
class RowResult:
    """A scheduler at a budget, for a prompt and a guidance scale: means over the seeds."""

    scheduler: str
    label: str
    grid: str
    stochastic: bool
    budget: int
    prompt: str
    guidance: float
    nfe: int | None
    steps: int | None
    done: int
    failed: int
    missing: int = 0
    is_reference: bool = False
    rank: int | None = None  # 1 is nearest to the reference; equal ranks are statistically tied
    seconds: Interval | None = None
    seconds_per_nfe: Interval | None = None
    metrics: dict[str, Interval | None] = field(default_factory=dict)

    @property
    def error(self) -> Interval | None:
        """The mean error; None where there is none."""
        return self.metrics.get("error")

    @property
    def place(self) -> Place:
        """What tells it from the other rows."""
        return self.label, self.grid, self.budget, self.prompt, self.guidance


@dataclass(frozen=True)
class OrderResult:
    """The measured order of convergence of a scheduler between two numbers of evaluations."""

    label: str
    grid: str
    prompt: str
    guidance: float
    order: float | None
    from_: int
    to: int


@dataclass(frozen=True)
class GridResult:
    """The points at which a scheduler evaluates the network, for the largest budget that it can use."""

    label: str
    grid: str
    budget: int
    times: tuple[float, ...]
    sigmas: tuple[float, ...]  # σ/α; σ for a flow


@dataclass(frozen=True)
class DuplicateResult:
    """Pairs of cells, by their numbers, with the same pixels."""

    cells: tuple[tuple[int, int], ...]
    expected: bool  # the arithmetic is the same
    why: str


@dataclass(frozen=True)
class Scale:
    """What gives a metric of pictures against data a scale: the value for real pictures, and for noise."""

    floor: float
    ceiling: float
    deviation: float | None = None  # standard deviation of the floor over several draws of real pictures


@dataclass(frozen=True)
class DistributionRow:
    """The pictures of a scheduler at a budget, measured against the data."""

    scheduler: str
    label: str
    grid: str
    stochastic: bool
    budget: int
    nfe: int
    guidance: float
    values: dict[str, float] | None  # by the name of the metric
    reason: str | None = None  # of a failure


@dataclass(frozen=True)
class DistributionResult:
    """The pictures of a training run, measured against its data with the metrics of `evaluate`."""

    data: str
    samples: int
    held_out: int
    better: dict[str, str]
    scales: dict[str, Scale]
    rows: tuple[DistributionRow, ...]


@dataclass(frozen=True)
class Results:
    """Everything that a comparison measured: the content of results.json."""

    command: str
    model: SubjectInfo
    axes: AxesInfo
    reference: ReferenceResult
    cells: tuple[CellResult, ...]
    rows: tuple[RowResult, ...]
    orders: tuple[OrderResult, ...]
    grids: tuple[GridResult, ...]
    duplicates: tuple[DuplicateResult, ...]
    verdict: tuple[str, ...] = ()
    seconds: float | None = None
    distribution: DistributionResult | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str | None = None
    folder: Path | None = field(default=None, metadata={"stored": False})  # where the files are
    codes: frozenset[ExitCode] = field(default=frozenset(), metadata={"stored": False})  # of everything that failed

    @property
    def report(self) -> Path | None:
        """The page."""
        return None if self.folder is None else self.folder / "report.html"

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        return {"schema": SCHEMA, **to_json(self)}

    @classmethod
    def from_json(cls, content: Any, folder: Path | None = None) -> Results:
        """The results that a results.json of this schema holds. Unknown keys are ignored, and a number that is not
        finite is read as null. Raises ValueError, which names the place."""
        return replace(_read(cls, content, "results"), folder=folder)


def to_json(value: Any) -> Any:
    """Dataclasses as dictionaries, tuples as lists, metrics as keys beside the others."""
    if is_dataclass(value) and not isinstance(value, type):
        content: dict[str, Any] = {}
        for part in _stored(value):
            inner = to_json(getattr(value, part.name))
            content |= inner if part.name == "metrics" else {part.name.rstrip("_"): inner}
        return content
    if isinstance(value, dict):
        return {name: to_json(inner) for name, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, tuple) else value


def _stored(kind: Any) -> list[Any]:
    return [part for part in fields(kind) if part.metadata.get("stored", True)]


def _read(kind: Any, value: Any, place: str) -> Any:
    """A JSON value as `kind`: a dataclass, tuple, dictionary, `X | None` or plain type. Raises ValueError."""
    parts = get_args(kind)
    if NoneType in parts:
        unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
        return None if unknown else _read(parts[0], value, place)
    if is_dataclass(kind):
        return _read_fields(kind, _checked(value, dict, place), place)
    if get_origin(kind) is dict:
        return {name: _read(parts[1], inner, f"{place}.{name}") for name, inner in _checked(value, dict, place).items()}
    if get_origin(kind) is tuple:
        values = _checked(value, list, place)
        kinds = parts[:1] * len(values) if parts[-1] is ... else parts
        if len(kinds) != len(values):
            raise ValueError(f"{place} has {len(values)} values, expected {len(kinds)}")
        return tuple(_read(k, inner, f"{place}[{i}]") for i, (k, inner) in enumerate(zip(kinds, values, strict=True)))
    return _checked(value, kind, place)


def _read_fields(kind: Any, content: dict[str, Any], place: str) -> Any:
    hints, values = get_type_hints(kind), {}
    names = [part.name.rstrip("_") for part in fields(kind)]
    for part in _stored(kind):
        name = part.name.rstrip("_")
        if name == "metrics":
            measured = {metric: content[metric] for metric in METRICS if metric in content and metric not in names}
            values[part.name] = _read(hints[name], measured, place)
        elif name in content:
            values[part.name] = _read(hints[part.name], content[name], f"{place}.{name}")
        elif part.default is MISSING and part.default_factory is MISSING:
            raise ValueError(f"{place}.{name} is missing")
    return kind(**values)


def _checked(value: Any, kind: type, place: str) -> Any:
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{place} is {type(value).__name__}, expected {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}, expected a finite number")
    return value
