"""The process that holds the model. What it costs the parent to lose it is the batch that was running."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from diffgen.errors import DiffgenError, ExitCode, InputError, InvalidOutput, OutOfMemory, UsageError
from diffgen.generation.plan import Plan
from diffgen.images.metadata import encode_png
from diffgen.models.find import Model
from diffgen.pipelines.plan import ModelFacts

PREVIEW_SECONDS = 0.2  # the shortest time between two live previews of a job
# Where it exists, worker processes are forked from one that has imported what they need: another one after a loss
# starts in the time that loading the model takes.
FORKED = "forkserver" in multiprocessing.get_all_start_methods()
ERRORS = {cls.code: cls for cls in (UsageError, InputError, OutOfMemory, InvalidOutput)}


class Cancelled(Exception):  # noqa: N818
    """Raised in a callback when nobody waits for the batch any more."""


def error_of(code: int, message: str, hint: str) -> DiffgenError:
    """The error that a process described by its exit code and its texts."""
    return ERRORS.get(ExitCode(code), DiffgenError)(message, hint)


def described(error: BaseException) -> tuple[int, str, str]:
    """An error as (exit code, message, hint), which every process can read."""
    if isinstance(error, DiffgenError):
        return int(error.code), error.message, error.hint
    return int(ExitCode.FAILED), f"{type(error).__name__}: {error}", ""


class Facts:
    """What the parent and its workers both know of the served models: a pickle refers to it instead of copying it."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = {model.name: model for model in models}
        self.of = {name: ModelFacts(model) for name, model in self.models.items() if not model.is_run}

    @property
    def modules(self) -> list[str]:
        """What the processes import that hold the models."""
        runs = {model.is_run for model in self.models.values()}
        return ["diffgen.training.generate" if is_run else "diffgen.pipelines.generate" for is_run in runs]

    def dumps(self, value: Any) -> bytes:
        """Pickle a value; what is shared goes in by its name."""
        shared = {
            id(getattr(facts, key)): (name, key)
            for name, facts in self.of.items()
            for key in ("about", "checked", "vocabulary")
        }
        shared.pop(id(None), None)

        class Pickler(pickle.Pickler):
            def persistent_id(self, item: Any) -> Any:
                return shared.get(id(item))

        file = io.BytesIO()
        Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
        return file.getvalue()

    def loads(self, data: bytes) -> Any:
        """The value that `dumps` pickled in another process of this server."""
        facts = self.of

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, identifier: Any) -> Any:
                name, key = identifier
                return getattr(facts[name], key)

        return Unpickler(io.BytesIO(data)).load()


class Worker:
    """A worker process as its parent sees it. `on_message(worker, message)` is called in a thread; None: it is gone."""

    def __init__(
        self,
        facts: Facts,
        device: str,
        dtype: str,
        options: Mapping[str, str],
        on_message: Callable[[Worker, tuple[Any, ...] | None], None],
    ) -> None:
        self.facts, self.device, self.dtype, self.options, self.on_message = facts, device, dtype, options, on_message
        self.process: Any = None
        self.connection: Connection | None = None

    def start(self) -> None:
        """Start the process, in a thread that then listens to it; it loads the first model and says so."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        context: Any = multiprocessing.get_context("forkserver" if FORKED else "spawn")
        if FORKED:
            context.set_forkserver_preload(self.facts.modules)
        connection, other = context.Pipe()
        self.connection = connection
        arguments = (other, list(self.facts.models.values()), self.device, self.dtype, dict(self.options))
        self.process = context.Process(target=run, args=arguments, name="diffgen worker", daemon=True)
        try:
            self.process.start()
            other.close()
            while True:
                self.on_message(self, pickle.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            self.on_message(self, None)

    def send(self, *message: Any) -> None:
        """Send a message; a worker that is gone is noticed by the thread that listens."""
        if self.connection is not None:
            with contextlib.suppress(OSError, ValueError):
                self.connection.send_bytes(self.facts.dumps(message))

    def stop(self) -> None:
        """End the process at once: it has nothing to tidy up."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join(5)


def run(connection: Connection, models: list[Model], device: str, dtype: str, options: Mapping[str, str]) -> None:
    """The worker process: load a model, then make batch after batch until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which outlives a process that is killed
    Maker(connection, models, device, dtype, options).run()


class Maker:
    """Makes batches of jobs and reports on them. Messages arrive in a thread of their own."""

    def __init__(
        self, connection: Connection, models: list[Model], device: str, dtype: str, options: Mapping[str, str]
    ) -> None:
        self.connection, self.facts = connection, Facts(models)
        self.device, self.dtype, self.options = device, dtype, options
        self.generator: Any = None
        self.cancelled: set[str] = set()
        self.watched: set[str] = set()
        self.batches: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self) -> None:
        """Load the first model, then make batches until the parent is gone."""
        first = next(iter(self.facts.models.values()))
        try:
            self._load(first)
        except BaseException as error:
            self._send("unloadable", described(error))
            return
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            jobs, partials = self.batches.get()
            self._make(jobs, partials)

    def _listen(self) -> None:
        while True:
            try:
                kind, *content = self.facts.loads(self.connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone
            if kind == "make":
                self.batches.put(content)
            elif kind == "cancel":
                self.cancelled.update(content)
            elif kind == "watch":
                self.watched.update(content)

    def _send(self, *message: Any) -> None:
        self.connection.send_bytes(pickle.dumps(message))

    def _load(self, model: Model) -> None:
        if self.generator is None or self.generator.model != model:
            from diffgen.loading import load

            self.generator = None  # before the next model takes memory
            self._release()
            self.generator = load(model, self.device, self.dtype, **self.options)
            gc.freeze()  # the objects of the imports need no collection
            self._send("loaded", model.name, self.generator.model_hash)

    def _make(self, jobs: Sequence[tuple[str, Plan]], partials: Mapping[str, int]) -> None:
        """Make the pictures of some jobs in one call; `partials` are the previews that a job wants at even steps."""
        ids = {id(plan): job for job, plan in jobs}
        names = set(ids.values())
        last: dict[str, float] = {}
        counts: dict[str, int] = {}
        total = 0

        def check() -> None:
            if names <= self.cancelled:
                raise Cancelled

        def on_step(done: int, of: int) -> None:
            nonlocal total
            total = of
            self._send("step", list(names), done, of)
            check()

        def on_denoised(shots: Any, evaluation: int, x0: Any) -> None:
            check()
            for row, shot in enumerate(shots):
                job = ids[id(shot.plan)]
                wanted, sent = partials.get(job, 0), counts.get(job, 0)
                due = sent < wanted and total and (evaluation + 1) * (wanted + 1) >= (sent + 1) * total
                live = job in self.watched and time.monotonic() - last.get(job, 0) >= PREVIEW_SECONDS
                if shot.index == 0 and (due or live):
                    last[job] = time.monotonic()
                    counts[job] = sent + bool(due)
                    self._send("preview", job, _png(self.generator.sketch(x0[row])), sent if due else None)

        try:
            plans = [plan for _, plan in jobs]
            self._load(plans[0].model)
            for picture in self.generator.pictures(plans, on_step, on_denoised):
                job = ids[id(picture.shot.plan)]
                if picture.image is None:
                    self._send("invalid", job, described(picture.error or InvalidOutput("no picture")))
                elif job not in self.cancelled:
                    self._send("picture", job, encode_png(picture.image, picture.record), picture.record)
                check()
        except BaseException as error:
            failure = None if isinstance(error, Cancelled) else described(error)
        else:
            failure = None
        if names <= self.cancelled or failure is not None:
            self._release()
        self.cancelled -= names
        self.watched -= names
        self._send("end", list(names), failure)

    def _release(self) -> None:
        from diffgen.pipelines.sampling import memory

        memory.release()


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
