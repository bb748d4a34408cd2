"""Make the cells of a comparison one by one; each is on the disk before the next begins.

The key of a cell is a hash of everything that determines it: the model's hash, the solver and its points, seed, prompt,
guidance, device, dtype, versions. A cell that exists is not made again, so a comparison can be resumed and extended.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

import schedulers
from diffgen.devices import out_of_memory
from diffgen.errors import DiffgenError, ExitCode, InputError, UsageError
from diffgen.generation import recorded
from diffgen.generation.grid_files import grid_notes
from diffgen.images.metadata import encode_png
from diffgen.images.pixels import pixels_sha256
from diffgen.images.publish import publish
from diffgen.images.read import read_image
from diffgen.models.gate import read_header, read_json
from diffgen.version import __version__
from schedulers import NoiseSchedule

from .plan import MAX_BUDGET, Axes, Cell, Entry, parse_entries
from .subjects import Counter, Subject

CELL = "diffgen.cell/1"
FAILURES = (DiffgenError, ArithmeticError, ValueError, RuntimeError)  # these end one cell, not the comparison
RECORDED = {  # the keys of a cell's record, with the checks of their values
    "seed": recorded.whole(0, 2**32 - 1),
    "nfe": recorded.whole(0, 10**6),
    "seconds": recorded.optional(recorded.number(0, 10**9)),
    "network_calls": recorded.optional(recorded.whole(0, 10**9)),
    "peak_memory": recorded.optional(recorded.whole(0, 2**60)),
    "pixels_sha256": recorded.sha256,
    "noise_sha256": recorded.sha256,
}
PNG_END = b"IEND\xaeB`\x82"


def image_name(key: str) -> str:
    """The file of a cell's picture, in the folder of its comparison."""
    return f"images/{key}.png"


@dataclass(frozen=True)
class ReferenceSpec:
    """The solution that errors are distances to: the exact one, or that of a good solver with many evaluations."""

    entry: Entry | None  # None: the exact solution
    nfe: int = 0

    @classmethod
    def parse(cls, text: str, exact: bool, noise: NoiseSchedule | None = None) -> ReferenceSpec | None:
        """Read "auto", "none", or SCHEDULER:NFE such as dpmpp_2m:200, on its default grid. Raises UsageError."""
        if text == "none":
            return None
        if text == "auto":
            return cls(None) if exact else cls(parse_entries([AUTOMATIC], noise=noise)[0], 128)
        label, _, number = text.rpartition(":")
        if not label or not re.fullmatch("[0-9]{1,9}", number) or not 4 <= int(number) <= MAX_BUDGET:
            raise UsageError(
                f"--reference must be auto, none or SCHEDULER:NFE with an NFE from 4 to {MAX_BUDGET} (got {text!r})",
                "for example --reference dpmpp_2m:200",
            )
        entry = parse_entries([label], noise=noise)[0]
        if entry.stochastic:
            raise UsageError(f"--reference {text}: {entry.scheduler} draws noise, so it has no fixed solution")
        return cls(entry, int(number))

    @property
    def name(self) -> str:
        """How the results call it."""
        if self.entry is None:
            return "exact solution"
        return f"{self.entry.label} on {self.entry.grid_name}, {self.nfe} evaluations"


AUTOMATIC = "dpmpp_3m"


class Folder:
    """The folder of a comparison: each cell is cells/KEY.json, cells/KEY.safetensors and images/KEY.png.

    A record names no file: it may come from somebody else.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape  # of a cell's result

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a finished cell; None if one of its files is missing, incomplete or not what a cell has."""
        record = self.read(self.path / "cells" / f"{key}.json", CELL)
        if not record or record.get("key") != key or not all(fits(record.get(k)) for k, fits in RECORDED.items()):
            return None
        try:
            with (self.path / image_name(key)).open("rb") as file:
                file.seek(-len(PNG_END), 2)
                complete = file.read() == PNG_END
            x0 = read_header(self.tensor_file(key)).get("x0")
        except (InputError, OSError):
            return None
        return record if complete and x0 is not None and (x0.dtype, x0.shape) == ("F32", self.shape) else None

    @staticmethod
    def read(file: Path, schema: str) -> dict[str, Any] | None:
        """The content of a JSON file of this schema; None if it is missing or incomplete."""
        if not file.is_file():
            return None
        try:
            content = read_json(file)
        except InputError:
            return None
        return content if content.get("schema") == schema else None

    def tensor_file(self, key: str) -> Path:
        """The file of the result of a cell."""
        return self.path / "cells" / f"{key}.safetensors"

    def result(self, key: str) -> Tensor:
        """The stored result of a cell, [B, …], float32. Raises InputError for one that is not finite."""
        x0 = load(self.tensor_file(key).read_bytes())["x0"]
        if not x0.isfinite().all():
            raise InputError(f"{self.tensor_file(key)} is damaged: it is not finite", "delete it, and --resume")
        return x0

    def picture(self, key: str) -> Image.Image:
        """The picture of a cell. Raises InputError."""
        return read_image(self.path / image_name(key))

    def store(self, key: str, record: Mapping[str, Any], x0: Tensor, png: bytes) -> None:
        """Write the files of a cell. The record comes last: if it is there, the others are complete."""
        for name in ("cells", "images"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        publish(self.path / image_name(key), png, overwrite=True)
        publish(self.tensor_file(key), save({"x0": x0.contiguous()}), overwrite=True)
        text = json.dumps({"schema": CELL, "key": key, **record}, indent=1)
        publish(self.path / "cells" / f"{key}.json", text.encode(), overwrite=True)


@dataclass(frozen=True)
class Task:
    """Something to sample: a cell, or the reference of a start."""

    entry: Entry | None  # None: the exact solution
    steps: int
    nfe: int
    seed: int
    prompt: str
    guidance: float
    key: str


class Comparison:
    """A subject, the axes, and the folder that holds what is done."""

    def __init__(self, subject: Subject, axes: Axes, reference: ReferenceSpec | None, folder: Path) -> None:
        self.subject, self.axes, self.reference = subject, axes, reference
        self.folder = Folder(folder, self._start_shape)
        self.cells = axes.cells(subject)
        self._networks: dict[tuple[str, float], Any] = {}
        self._schedulers: dict[Entry, schedulers.Scheduler] = {}
        self._contents: dict[tuple[Entry, int], dict[str, Any]] = {}
        self.codes: set[ExitCode] = set()  # the exit codes of everything that failed
        self.failures = {i: self.failed(cell.failure) for i, cell in enumerate(self.cells) if cell.failure}
        self.reference_failure: str | None = None  # why a reference could not be computed

    # What there is to do

    def tasks(self) -> list[Task]:
        """One for each different cell, then the references; cells with the same key are one task."""
        tasks: dict[str, Task] = {}
        for cell in self.cells:
            if (task := self._task_of(cell)) is not None:
                tasks.setdefault(task.key, task)
        for start in self.axes.starts():
            for task in self.reference_tasks(*start):
                tasks.setdefault(task.key, task)
        return list(tasks.values())

    def unfinished(self) -> list[Task]:
        """The tasks that are not done yet."""
        return [task for task in self.tasks() if self.folder.record(task.key) is None]

    def key(self, cell: Cell) -> str | None:
        """The key of a cell; None for one that cannot be made."""
        task = self._task_of(cell)
        return None if task is None else task.key

    def reference_tasks(self, seed: int, prompt: str, guidance: float) -> list[Task]:
        """The reference of a start and, unless it is exact, the same with half the evaluations, for its own error."""
        if self.reference is None:
            return []
        if self.reference.entry is None:
            return [self._task(None, 0, 0, seed, prompt, guidance)]
        scheduler = self.scheduler(self.reference.entry)
        tasks = []
        for budget in (self.reference.nfe, self.reference.nfe // 2):
            steps = scheduler.steps_for(budget)
            tasks.append(self._task(self.reference.entry, steps, scheduler.nfe(steps), seed, prompt, guidance))
        return tasks

    def notes(self) -> list[str]:
        """Warnings about the prompts, and about tuned grids that are used at other steps or guidance than their own."""
        settings = dict.fromkeys((c.entry.grid, c.steps, c.guidance) for c in self.cells if c.steps is not None)
        of_grids = [grid_notes({"grid": grid, "steps": steps, "guidance": scale}) for grid, steps, scale in settings]
        return list(dict.fromkeys(note for notes in [self.subject.remarks, *of_grids] for note in notes))

    def scheduler(self, entry: Entry) -> schedulers.Scheduler:
        """The scheduler of an entry for this subject."""
        if entry not in self._schedulers:
            self._schedulers[entry] = entry.build(self.subject)
        return self._schedulers[entry]

    def _task_of(self, cell: Cell) -> Task | None:
        if cell.steps is None or cell.nfe is None:
            return None
        return self._task(cell.entry, cell.steps, cell.nfe, cell.seed, cell.prompt, cell.guidance)

    def _task(self, entry: Entry | None, steps: int, nfe: int, seed: int, prompt: str, guidance: float) -> Task:
        subject = self.subject
        content: dict[str, Any] = {
            "model": subject.model_hash,
            "device": subject.device.type,
            "dtype": str(subject.dtype),
            "start": list(self._start_shape),
            "seed": seed,
            "prompt": prompt,
            "guidance": guidance,
            "versions": versions(),
        }
        if entry is not None:
            content |= self.solver_content(entry, steps)
        return Task(entry, steps, nfe, seed, prompt, guidance, key_of(content))

    @cached_property
    def _start_shape(self) -> tuple[int, ...]:
        return tuple(self.subject.start(0)[0].shape)

    def solver_content(self, entry: Entry, steps: int) -> dict[str, Any]:
        """The part of a key's content that depends on the scheduler and its steps only."""
        if (entry, steps) not in self._contents:
            scheduler = self.scheduler(entry)
            grid = scheduler.grid(steps)
            self._contents[entry, steps] = {
                "solver": scheduler.name,
                "options": scheduler.options | scheduler.limits,
                "points": [(p.t, p.alpha, p.sigma) for p in grid.points],
                "corrections": grid.corrections,
            }
        return self._contents[entry, steps]

    # Doing it

    def warm_up(self) -> dict[float, float]:
        """Measure the seconds of one function evaluation at each guidance scale, after one that is not timed."""
        return {guidance: self._timed(guidance) for guidance in self.axes.guidance}

    def _timed(self, guidance: float) -> float:
        network = self._network(self.axes.prompts[0], guidance)
        noise, _ = self.subject.start(self.axes.seeds[0])
        x = noise.to(self.subject.device)
        t = torch.full((len(x),), float(self.subject.noise.noisiest.t), device=x.device)
        seconds = []
        with torch.inference_mode(), out_of_memory():
            for _ in range(3):
                self._wait()
                began = time.perf_counter()
                network(x.to(self.subject.dtype), t)
                self._wait()
                seconds.append(time.perf_counter() - began)
        return min(seconds[1:])

    def make(self, on_step: Callable[[int, int], None] | None = None) -> Iterator[Task]:
        """Run the unfinished tasks and yield each when it is done. A failure is recorded, and the next task runs.

        `on_step(done, total)` counts evaluations.
        """
        tasks = self.unfinished()
        total, done = sum(task.nfe for task in tasks), 0
        reasons: dict[str, str] = {}
        try:
            for task in tasks:
                try:
                    self._make(task)
                except FAILURES as error:
                    reasons[task.key] = self.failed(error)
                done += task.nfe
                if on_step is not None:
                    on_step(done, max(total, 1))
                yield task
        finally:  # also if it is interrupted
            for i, cell in enumerate(self.cells):
                key = self.key(cell)
                if key in reasons:
                    self.failures[i] = reasons[key]
            keys = [task.key for start in self.axes.starts() for task in self.reference_tasks(*start)]
            self.reference_failure = next((reasons[key] for key in keys if key in reasons), None)

    def failed(self, error: Exception) -> str:
        """The reason of a failure; its exit code is recorded."""
        code = error.code if isinstance(error, DiffgenError) else ExitCode.FAILED
        self.codes.add(ExitCode.OUTPUT if isinstance(error, schedulers.NonFinite) else code)
        return str(error) or type(error).__name__

    def _make(self, task: Task) -> None:
        noise, generator = self.subject.start(task.seed)
        digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
        record: dict[str, Any] = {"seed": task.seed, "noise_sha256": digest, "nfe": 0, "seconds": None}
        with torch.inference_mode(), out_of_memory():
            if task.entry is None:
                exact = self.subject.exact(noise)
                assert exact is not None, "a reference without a scheduler is the exact one"
                x0 = exact
            else:
                x0, measured = self._sample(task, noise, generator)
                record |= measured
            picture = self.subject.picture(x0)
        record |= {"pixels_sha256": pixels_sha256(picture), "image": image_name(task.key)}
        self.folder.store(task.key, record, x0.float().cpu(), encode_png(picture, {}, "none"))

    def _sample(self, task: Task, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        assert task.entry is not None
        scheduler = self.scheduler(task.entry)
        grid = scheduler.grid(task.steps)
        counter = Counter(self._network(task.prompt, task.guidance), self.subject.module)
        x = scheduler.start(noise, grid).to(self.subject.device, self.subject.dtype)
        cuda = self.subject.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.subject.device)
        self._wait()
        began = time.perf_counter()
        with counter, warnings.catch_warnings():  # `notes` reports an interpolated grid once
            warnings.simplefilter("ignore")
            x0 = scheduler.sample(counter, x, grid, generator)
        self._wait()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(self.subject.device) if cuda else resident()
        counts = {"nfe": counter.nfe, "network_calls": counter.network_calls}
        return x0, {**counts, "seconds": seconds, "peak_memory": peak}

    def _network(self, prompt: str, guidance: float) -> Any:
        if (prompt, guidance) not in self._networks:
            self._networks[prompt, guidance] = self.subject.network([prompt], guidance)
        return self._networks[prompt, guidance]

    def _wait(self) -> None:
        """Wait for the device, so that the clock measures its work."""
        kind = self.subject.device.type
        if kind != "cpu":
            getattr(torch, kind).synchronize()


def resident() -> int | None:
    """The peak memory of this process so far in bytes; None where the system does not report it."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def key_of(content: Mapping[str, Any]) -> str:
    """A name for content, 32 hexadecimal digits: equal content has the same."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=float).encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {"diffgen": __version__, "torch": str(torch.__version__)}
