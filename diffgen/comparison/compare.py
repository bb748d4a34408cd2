"""`diffgen.compare`: compare schedulers on a model, as the command does. Importing this imports no torch."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from diffgen import environment
from diffgen.devices import device_name, dtype_name
from diffgen.errors import CannotWrite, InputError, UsageError, checked_arguments
from diffgen.generation.checks import check_int
from diffgen.images.lock import locked
from diffgen.images.metadata import base_name

from . import plan

if TYPE_CHECKING:
    from .distribution import Distribution
    from .results import Results
    from .run import Comparison

Names = str | Sequence[str]  # names, or their text with commas
Numbers = str | float | Iterable[float]  # numbers, or their text as on the command line
Progress = Callable[[int, int, str], None]

PATHS = {"-m", "--model", "-o", "--out", "--output", "--grids", "--data"}  # options with paths as values
MAX_RESULTS = 256 << 20  # bytes of a results.json


@dataclass(frozen=True)
class Estimate:
    """What a comparison will do, and how long that takes."""

    model: str
    entries: int
    budgets: int
    seeds: int
    cells: int
    impossible: int  # cells that cannot be made
    unfinished: int  # cells and references that are not done yet
    evaluations: int
    seconds: float
    seconds_each: tuple[float, ...]  # of one evaluation, at each guidance scale; empty if there is nothing to do
    data_evaluations: int | None  # of single pictures, to measure them against data
    data_seconds: float | None  # at most: they are evaluated in batches
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        counts = {
            "cells": self.cells,
            "impossible": self.impossible,
            "to_do": self.unfinished,
            "evaluations": self.evaluations,
            "seconds_estimated": round(self.seconds + (self.data_seconds or 0.0), 3),
        }
        return counts if self.data_evaluations is None else counts | {"data_evaluations": self.data_evaluations}


@dataclass(frozen=True)
class Prepared:
    """A comparison that can begin."""

    comparison: Comparison
    distribution: Distribution | None

    def estimate(self) -> Estimate:
        """Count what is to do, and time one evaluation, and one result that is drawn, written and measured."""
        from .measure import seconds_to_finish
        from .tables import numbered

        comparison, distribution = self.comparison, self.distribution
        axes, tasks = comparison.axes, comparison.unfinished()
        each = comparison.warm_up() if tasks or distribution is not None else {}
        settings = [] if distribution is None else [(nfe, guidance) for *_, nfe, guidance in distribution.settings()]
        samples = 0 if distribution is None else distribution.samples
        reasons = list(comparison.failures.values())
        impossible = [f"{numbered(reasons.count(r), 'cell')} cannot be made: {r}" for r in dict.fromkeys(reasons)]
        return Estimate(
            model=comparison.subject.name,
            entries=len(axes.entries),
            budgets=len(axes.budgets),
            seeds=len(axes.seeds),
            cells=len(comparison.cells),
            impossible=len(reasons),
            unfinished=len(tasks),
            evaluations=sum(task.nfe for task in tasks),
            seconds=sum(each[task.guidance] * task.nfe for task in tasks) + seconds_to_finish(comparison, tasks),
            seconds_each=tuple(each.values()),
            data_evaluations=None if distribution is None else sum(samples * nfe for nfe, _ in settings),
            data_seconds=None if distribution is None else sum(each[g] * samples * nfe for nfe, g in settings),
            warnings=(*impossible, *comparison.notes()),
        )

    def run(self, command: str, on_step: Progress | None, stop: Callable[[], bool]) -> Results:
        """Make the cells and measure them. An exception that arrives while `stop()` is true ends the work, too."""
        from .measure import measure

        comparison, distribution = self.comparison, self.distribution
        name, measured, began = comparison.subject.name, None, time.perf_counter()

        def step(text: str) -> Callable[[int, int], None] | None:
            return None if on_step is None else lambda done, total: on_step(done, total, text)

        try:
            for _ in comparison.make(step(name)):
                if stop():
                    break
            if distribution is not None and not stop():
                measured = distribution.result(step(f"{name}: {distribution.samples} pictures of each"))
        except BaseException:
            if not stop():
                raise
        return measure(comparison, command, round(time.perf_counter() - began, 3), measured)


def prepare(
    prompts: str | Sequence[str] = (),
    *,
    folder: Path,
    model: str | os.PathLike[str] | None = None,
    schedulers: Names = "fast",
    nfe: Numbers = "5,10,20",
    seeds: Numbers = "0-3",
    grids: Names = "",
    guidance: Numbers = "",
    reference: str = "auto",
    data: str | None = None,
    samples: int = 500,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
) -> Prepared:
    """Check every option and load the model; see `compare`."""
    device, dtype = device_name(device), dtype_name(dtype)
    labels = plan.SETS.get(schedulers, schedulers) if isinstance(schedulers, str) else schedulers
    plan.parse_entries(_names(labels), _names(grids))  # before the model is loaded
    budgets, numbers = plan.parse_budgets(_text(nfe)), plan.parse_seeds(_text(seeds))
    scales = plan.parse_guidance(_text(guidance)) if _text(guidance) else ()
    check_int("--samples", samples, 2, 100_000)
    name = None if model is None else os.fspath(model)
    if data is not None and name in (None, "mixture"):
        raise UsageError("--data is for a training run, which -m names")
    environment.prepare(offline)
    from .distribution import Distribution
    from .run import Comparison, ReferenceSpec
    from .subjects import RunSubject, subject_of

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    subject, texts_used, scales = subject_of(name, texts, scales, device, dtype)
    entries = plan.parse_entries(_names(labels), _names(grids), subject.noise)
    spec = ReferenceSpec.parse(reference, subject.is_mixture, subject.noise)
    comparison = Comparison(subject, plan.Axes(entries, budgets, numbers, texts_used, scales), spec, folder)
    if data is None:
        return Prepared(comparison, None)
    if not isinstance(subject, RunSubject):
        raise UsageError(f"--data is for a training run, and {subject.name} is none")
    return Prepared(comparison, Distribution(comparison, data, samples))


@checked_arguments(*(name for name in inspect.signature(prepare).parameters if name != "folder"))
def compare(
    prompts: str | Sequence[str] = (),
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_wait: Callable[[str], None] | None = None,
    on_start: Callable[[Estimate], None] | None = None,
    on_step: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    command: Sequence[str] | None = None,
    **options: Any,
) -> Results:
    """Compare schedulers side by side: the same noise, the same number of network evaluations (NFE).

        results = diffgen.compare(model="mixture", schedulers=["euler", "dpmpp_2m"], nfe=[5, 10], out="mixture")
        results.rows[0].error.mean

    Writes report.html, results.json, results.csv and grid.png to the folder `out`. Lists can also be given as the text
    that the command takes, such as seeds="0-7".

    resume      continue in a folder that has cells; they are kept
    model       any model, or "mixture", whose exact answer is known; by default the bundled one
    schedulers  names, or "fast" or "all"
    nfe         budgets of function evaluations
    seeds       starting noises
    grids       every scheduler on each of them; by default each on its own
    guidance    guidance scales, 1 is off; by default the model's
    reference   auto, none or SCHEDULER:NFE: the solution that errors are distances to
    data        for a training run: what it was trained on, to measure its pictures against
    samples     pictures of each scheduler at each budget, with data
    device, dtype, offline
    command     the words of a command line, recorded without absolute paths; by default that of the same comparison

    `on_wait(message)` is called again and again while another process compares in the folder; without it, CannotWrite
    is raised then. `on_start(estimate)` is called before the first cell, `on_step(done, total, text)` after each;
    `stop()` is asked between cells, and if it is true, the results are those of the finished cells. An exception in a
    callback ends the comparison; the finished cells stay for `resume`.

    Raises UsageError for an option, InputError for a model, grid file or data, CannotWrite for the folder.
    """
    folder = _folder(out, resume)
    prepared = prepare(prompts, folder=folder, **options)
    words = _command(prompts, folder, options) if command is None else list(command)
    with locked(folder, "comparing", on_wait):
        estimate = prepared.estimate()
        if on_start is not None:
            on_start(estimate)
        results = prepared.run(shlex.join(without_folders(words)), on_step, stop or (lambda: False))
        write(results, folder)
    return replace(results, folder=folder)


def without_folders(words: Sequence[str]) -> list[str]:
    """A command line with base names in place of absolute paths, which name a user or a machine."""
    shown, option = [], ""
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], "")
        if option in PATHS:
            word = _without_folders(word)
        elif name in PATHS and equals:
            word = name + (f"={_without_folders(value)}" if word.startswith("--") else _without_folders(equals))
        option = "" if option in PATHS else word
        shown.append(word)
    return shown


def _without_folders(value: str) -> str:
    """The option's value, whose paths are separated by commas."""
    paths = [path.strip() for path in value.split(",")]
    return ",".join(base_name(path) if PurePath(path).is_absolute() or path.startswith("~") else path for path in paths)


def write(results: Results, folder: Path) -> None:
    """Write the results as data, as a page and as a picture."""
    from .report import page
    from .sheet import sheet
    from .tables import as_csv

    image = BytesIO()
    sheet(results, folder).save(image, "PNG")
    _write(folder, "results.json", json.dumps(results.to_json(), indent=1, allow_nan=False).encode())
    _write(folder, "results.csv", as_csv(results.cells).encode())
    _write(folder, "report.html", page(results, folder).encode())
    _write(folder, "grid.png", image.getvalue())


def rewrite_report(folder: Path) -> Path:
    """Write the page of a folder again, from its results.json. Raises InputError, CannotWrite."""
    from jinja2 import TemplateError

    from diffgen.models.gate import read_json

    from .report import page
    from .results import SCHEMA, Results

    file = folder / "results.json"
    if not file.is_file():
        raise InputError(
            f"{folder} holds no comparison: there is no results.json", "make one: diffgen compare -o FOLDER"
        )
    content = read_json(file, MAX_RESULTS)
    if content.get("schema") != SCHEMA:
        raise InputError(f"{file}: not a comparison of this version (schema {content.get('schema')!r})")
    try:
        html = page(Results.from_json(content, folder), folder)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, TemplateError) as error:
        raise InputError(f"{folder}: damaged: {error}") from error
    _write(folder, "report.html", html.encode())
    return folder / "report.html"


def _names(value: Names) -> list[str]:
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value) if name.strip()]


def _text(value: Numbers) -> str:
    """Numbers as the command line has them."""
    if isinstance(value, str):
        return value
    return ",".join(map(str, value)) if isinstance(value, Iterable) else str(value)


def _command(prompts: str | Sequence[str], folder: Path, options: dict[str, Any]) -> list[str]:
    """The command line of the same comparison, as words."""
    words = ["diffgen", "compare"]
    for name, value in options.items():
        if name == "offline":
            words += ["--offline"] * bool(value)
        elif value is not None:
            text = os.fspath(value) if isinstance(value, os.PathLike) else _text(value)
            words += ["-m" if name == "model" else f"--{name}", text]
    texts = [prompts] if isinstance(prompts, str) else prompts
    return [*words, "-o", str(folder), *(["--", *texts] if texts else [])]


def _folder(out: str | os.PathLike[str] | None, resume: bool) -> Path:
    """The folder to write to, which need not exist yet. Raises UsageError, CannotWrite."""
    if out is None:
        raise UsageError("a comparison needs a folder to write to", "add -o FOLDER")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise CannotWrite(f"cannot write to {out}: it is a file", "choose another -o")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        hint = "continue there with --resume, or choose another -o"
        raise CannotWrite(f"cannot write to {out}: it is not empty", hint)
    return folder


def _write(folder: Path, name: str, data: bytes) -> None:
    from diffgen.images.publish import publish

    publish(folder / name, data, overwrite=True)
