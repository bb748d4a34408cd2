"""The cells of a comparison, made one after the other; each that is done is on the disk before the next begins.

A cell is known by its content: the model's hash, the points at which the solver asks, seed, prompt, guidance, device,
dtype, versions. What is there already is never made again, so a comparison can be resumed, and grown.
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
from safetensors.torch import load, save
from torch import Tensor

import schedulers
from diffgen.devices import out_of_memory
from diffgen.errors import DiffgenError, ExitCode, InputError
from diffgen.generation.grid_files import grid_notes
from diffgen.images.metadata import encode_png
from diffgen.images.pixels import pixels_sha256
from diffgen.images.publish import publish
from diffgen.models.gate import read_header, read_json
from diffgen.version import __version__

from .plan import Axes, Cell, Entry
from .subjects import Counter, Subject

CELL = "diffgen.cell/1"
FAILURES = (DiffgenError, ArithmeticError, ValueError, RuntimeError)  # that end one cell, not the comparison
KEPT = {"seed", "nfe", "seconds", "image", "pixels_sha256", "noise_sha256"}  # what the record of a cell has
PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Reference:
    """The solution that the cells approach: the exact one, or that of a good solver with very many evaluations."""

    entry: Entry | None  # None: the exact answer
    nfe: int = 0

    @classmethod
    def parse(cls, text: str, exact: bool) -> Reference | None:
        """ "auto", "none", or SCHEDULER:NFE such as dpmpp_2m:200. Raises UsageError."""
        from diffgen.errors import UsageError

        from .plan import MAX_BUDGET, parse_entries

        if text == "none":
            return None
        if text == "auto":
            return cls(None) if exact else cls(*AUTOMATIC)
        label, _, number = text.rpartition(":")
        if not label or not re.fullmatch("[0-9]{1,9}", number) or not 4 <= int(number) <= MAX_BUDGET:
            raise UsageError(
                f"--reference must be auto, none or SCHEDULER:NFE with an NFE from 4 to {MAX_BUDGET} (got {text!r})",
                "for example --reference dpmpp_2m:200",
            )
        entry = parse_entries([label])[0]
        if entry.stochastic:
            raise UsageError(f"--reference {text}: {entry.scheduler} draws noise, so it has no solution to approach")
        return cls(entry, int(number))


AUTOMATIC = (Entry("dpmpp_3m", "dpmpp_3m", "karras"), 128)


class Folder:
    """Where the cells of a comparison lie: cells/KEY.json and .safetensors, images/KEY.png."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, key: str) -> dict[str, Any] | None:
        """What is known of a finished cell; None if it is not there, or not whole."""
        found = self.read(self.path / "cells" / f"{key}.json", CELL)
        if not found or found.get("key") != key or not found.keys() >= KEPT:
            return None
        try:
            with (self.path / "images" / f"{key}.png").open("rb") as file:
                file.seek(-len(PNG_END), 2)
                whole = file.read() == PNG_END
            return found if whole and "x0" in read_header(self.tensor_file(key)) else None
        except (InputError, OSError):
            return None

    @staticmethod
    def read(file: Path, schema: str) -> dict[str, Any] | None:
        """The content of a file of that schema; None if it is not there, or cut off in the middle."""
        if not file.is_file():
            return None
        try:
            found = read_json(file)
        except InputError:
            return None
        return found if found.get("schema") == schema else None

    def tensor_file(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.safetensors"

    def result(self, key: str) -> Tensor:
        """The stored result [B, …]."""
        return load(self.tensor_file(key).read_bytes())["x0"]

    def store(self, key: str, record: Mapping[str, Any], x0: Tensor, png: bytes) -> None:
        """The record last: where it is, the rest is."""
        for name in ("cells", "images"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        publish(self.path / record["image"], png, overwrite=True)
        publish(self.tensor_file(key), save({"x0": x0.contiguous()}), overwrite=True)
        text = json.dumps({"schema": CELL, "key": key, **record}, indent=1)
        publish(self.path / "cells" / f"{key}.json", text.encode(), overwrite=True)


@dataclass
class Job:
    """Something to sample: a cell, or a reference of a start."""

    entry: Entry | None
    steps: int
    nfe: int
    seed: int
    prompt: str
    guidance: float
    key: str


class Comparison:
    """A subject, the axes, and the folder that holds what is done."""

    def __init__(self, subject: Subject, axes: Axes, reference: Reference | None, folder: Path) -> None:
        self.subject, self.axes, self.reference, self.folder = subject, axes, reference, Folder(folder)
        self.cells = axes.cells(subject)
        self._networks: dict[tuple[str, float], Any] = {}
        self._schedulers: dict[Entry, schedulers.Scheduler] = {}
        self._walks: dict[tuple[Entry, int], dict[str, Any]] = {}
        self.codes: set[ExitCode] = set()  # of all that failed
        self.failures: dict[int, str] = {i: self.failed(c.failure) for i, c in enumerate(self.cells) if c.failure}
        self.reference_failure: str | None = None  # why a reference could not be made

    # What there is to do

    def jobs(self) -> list[Job]:
        """One for each different cell, then the references; the same content twice is one job."""
        found: dict[str, Job] = {}
        for cell in self.cells:
            if cell.steps is not None and cell.nfe is not None:
                job = self._job(cell.entry, cell.steps, cell.nfe, cell.seed, cell.prompt, cell.guidance)
                found.setdefault(job.key, job)
        for start in self.axes.starts():
            for job in self.reference_jobs(*start):
                found.setdefault(job.key, job)
        return list(found.values())

    def key(self, cell: Cell) -> str | None:
        if cell.steps is None or cell.nfe is None:
            return None
        return self._job(cell.entry, cell.steps, cell.nfe, cell.seed, cell.prompt, cell.guidance).key

    def reference_jobs(self, seed: int, prompt: str, guidance: float) -> list[Job]:
        """The reference of a start and, unless it is exact, the same with half the evaluations, for its own error."""
        if self.reference is None:
            return []
        if self.reference.entry is None:
            return [self._job(None, 0, 0, seed, prompt, guidance)]
        scheduler = self.scheduler(self.reference.entry)
        jobs = []
        for budget in (self.reference.nfe, self.reference.nfe // 2):
            steps = scheduler.steps_for(budget)
            jobs.append(self._job(self.reference.entry, steps, scheduler.nfe(steps), seed, prompt, guidance))
        return jobs

    def notes(self) -> list[str]:
        """What to know of the prompts, and of tuned grids for another number of steps or guidance than their own."""
        settings = dict.fromkeys((c.entry.grid, c.steps, c.guidance) for c in self.cells if c.steps is not None)
        found = [grid_notes({"grid": grid, "steps": steps, "guidance": scale}) for grid, steps, scale in settings]
        return list(dict.fromkeys(note for notes in [self.subject.remarks, *found] for note in notes))

    def waiting(self) -> list[Job]:
        """The jobs that are not done yet."""
        return [job for job in self.jobs() if self.folder.record(job.key) is None]

    def scheduler(self, entry: Entry) -> schedulers.Scheduler:
        if entry not in self._schedulers:
            self._schedulers[entry] = entry.build(self.subject)
        return self._schedulers[entry]

    def _job(self, entry: Entry | None, steps: int, nfe: int, seed: int, prompt: str, guidance: float) -> Job:
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
            content |= self.walked(entry, steps)
        text = json.dumps(content, sort_keys=True, default=float)
        return Job(entry, steps, nfe, seed, prompt, guidance, hashlib.sha256(text.encode()).hexdigest()[:32])

    @cached_property
    def _start_shape(self) -> tuple[int, ...]:
        return tuple(self.subject.start(0)[0].shape)

    def walked(self, entry: Entry, steps: int) -> dict[str, Any]:
        """What a scheduler and its steps add to a content, of which a key is made; the same for all starts."""
        if (entry, steps) not in self._walks:
            scheduler = self.scheduler(entry)
            grid = scheduler.grid(steps)
            self._walks[entry, steps] = {
                "solver": scheduler.name,
                "options": scheduler.options | scheduler.limits,
                "points": [(p.t, p.alpha, p.sigma) for p in grid.points],
                "corrections": grid.corrections,
            }
        return self._walks[entry, steps]

    # Doing it

    def warm_up(self) -> dict[float, float]:
        """Seconds of one function evaluation at each guidance, after one that does not count.

        Raises what the model raises.
        """
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

    def make(self, on_step: Callable[[int, int], None] | None = None) -> Iterator[Job]:
        """Make what is not there, and yield each job as it is done; a failure is noted, and the rest goes on."""
        waiting = self.waiting()
        total, done = sum(job.nfe for job in waiting), 0
        reasons: dict[str, str] = {}
        try:
            for job in waiting:
                try:
                    self._make(job)
                except FAILURES as error:
                    reasons[job.key] = self.failed(error)
                done += job.nfe
                if on_step is not None:
                    on_step(done, max(total, 1))
                yield job
        finally:  # also of a comparison that is interrupted
            for i, cell in enumerate(self.cells):
                key = self.key(cell)
                if key in reasons:
                    self.failures[i] = reasons[key]
            own = [job.key for start in self.axes.starts() for job in self.reference_jobs(*start)]
            self.reference_failure = next((reasons[key] for key in own if key in reasons), None)

    def failed(self, error: Exception) -> str:
        """Why something could not be made; its exit code is noted."""
        own = error.code if isinstance(error, DiffgenError) else ExitCode.FAILED
        self.codes.add(ExitCode.OUTPUT if isinstance(error, schedulers.NonFinite) else own)
        return str(error) or type(error).__name__

    def _make(self, job: Job) -> None:
        noise, generator = self.subject.start(job.seed)
        digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
        record: dict[str, Any] = {"seed": job.seed, "noise_sha256": digest, "nfe": 0, "seconds": None}
        with torch.inference_mode(), out_of_memory():
            if job.entry is None:
                exact = self.subject.exact(noise)
                assert exact is not None, "a reference without a scheduler is the exact one"
                x0 = exact
            else:
                x0, measured = self._sample(job, noise, generator)
                record |= measured
            picture = self.subject.picture(x0)
        record |= {"pixels_sha256": pixels_sha256(picture), "image": f"images/{job.key}.png"}
        self.folder.store(job.key, record, x0.float().cpu(), encode_png(picture, {}, "none"))

    def _sample(self, job: Job, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        assert job.entry is not None
        scheduler = self.scheduler(job.entry)
        grid = scheduler.grid(job.steps)
        counter = Counter(self._network(job.prompt, job.guidance), self.subject.module)
        x = scheduler.start(noise, grid).to(self.subject.device, self.subject.dtype)
        cuda = self.subject.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.subject.device)
        self._wait()
        began = time.perf_counter()
        with counter, warnings.catch_warnings():  # of an interpolated grid: `notes` says it once
            warnings.simplefilter("ignore")
            x0 = scheduler.sample(counter, x, grid, generator)
        self._wait()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(self.subject.device) if cuda else resident()
        said = {"nfe": counter.nfe, "network_calls": counter.network_calls}
        return x0, {**said, "seconds": seconds, "peak_memory": peak}

    def _network(self, prompt: str, guidance: float) -> Any:
        if (prompt, guidance) not in self._networks:
            self._networks[prompt, guidance] = self.subject.network([prompt], guidance)
        return self._networks[prompt, guidance]

    def _wait(self) -> None:
        """Until the device has done what it was told: only then is the clock worth reading."""
        kind = self.subject.device.type
        if kind != "cpu":
            getattr(torch, kind).synchronize()


def resident() -> int | None:
    """The most bytes of memory that this process has held so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    return {"diffgen": __version__, "torch": str(torch.__version__)}
