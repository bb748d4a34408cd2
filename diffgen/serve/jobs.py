"""Jobs, the queue in which they wait, and the workers that take batches from it. All in the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from diffgen.errors import DiffgenError
from diffgen.generation.plan import Plan

from .gallery import Entry, Gallery
from .settings import KEEP_JOBS, Refused, Settings
from .worker import Facts, Worker, error_of

FINISHED = ("done", "failed", "cancelled")
RESTARTS = 3  # of a worker that ends before it has made anything
WAIT_SHARE = 0.1  # of the last batch's time: how long a worker waits for clients to come back
EVENTS = 256  # unread events of one listener; then it misses previews and steps


@dataclass(eq=False)
class Job:
    """One request's pictures."""

    plan: Plan
    client: Hashable
    exact: bool = False
    partials: int = 0  # previews at even steps
    warnings: list[str] = field(default_factory=list)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    status: str = "queued"
    step: int = 0  # evaluations of the network so far, of its batch
    steps: int = 0
    entries: list[Entry] = field(default_factory=list)
    failures: list[DiffgenError] = field(default_factory=list)  # of single pictures
    error: DiffgenError | None = None
    preview: bytes | None = None  # PNG
    created: float = field(default_factory=time.time)
    begun: float | None = None
    ended: float | None = None
    stores: list[asyncio.Task[None]] = field(default_factory=list)  # pictures on their way to the gallery
    lost: bool = False  # a worker ended before the first step; the job is tried once more
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: set[asyncio.Queue[tuple[str, dict[str, Any]]]] = field(default_factory=set)

    @property
    def key(self) -> Hashable:
        """Jobs with equal keys can be one batch; None for a job that is made alone."""
        return None if self.exact else (self.plan.model, self.plan.batch_key)

    def emit(self, kind: str, **data: Any) -> None:
        """Tell the listeners; one that does not read misses what the next event repeats."""
        for listener in self.listeners:
            if listener.qsize() < EVENTS or kind in FINISHED:
                listener.put_nowait((kind, data))

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Queue[tuple[str, dict[str, Any]]]]:
        """The queue of the events from now on: queued, started, step, preview, picture, then one of FINISHED."""
        listener: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self.listeners.add(listener)
        try:
            yield listener
        finally:
            self.listeners.discard(listener)

    def finish(self, status: str, error: DiffgenError | None = None) -> None:
        """End the job, once."""
        if self.status in FINISHED:
            return
        self.status, self.error, self.ended, self.preview = status, error, time.time(), None
        self.emit(status)
        self.finished.set()


@dataclass(eq=False)
class Slot:
    """A worker and what it does."""

    worker: Worker
    running: list[Job] = field(default_factory=list)
    ready: bool = False
    begun: float = 0.0
    seconds: float = 0.0  # of the last batch
    ended: float = 0.0
    expected: int = 0  # jobs that were waiting or left when the last batch ended
    failures: int = 0  # ends without a batch in between


class Dispatcher:
    """The bounded, fair queue and its workers: clients take turns, each client's jobs go in their order."""

    def __init__(
        self,
        settings: Settings,
        facts: Facts,
        gallery: Gallery,
        devices: list[str],
        dtype: str,
        options: dict[str, str],
        connections: Callable[[], int] = lambda: 2,
    ) -> None:
        self.settings, self.facts, self.gallery, self.connections = settings, facts, gallery, connections
        self.loop = asyncio.get_running_loop()
        self.waiting: OrderedDict[Hashable, deque[Job]] = OrderedDict()  # by client; the first one's turn is next
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.slots = [Slot(Worker(facts, device, dtype, options, self._receive)) for device in devices]
        self.closing = False
        self.unloadable: DiffgenError | None = None
        self.loaded: asyncio.Future[None] = self.loop.create_future()
        self.hashes: dict[str, str] = {}  # of the models' weights
        self.counts: dict[str, int] = dict.fromkeys(FINISHED, 0) | {"refused": 0}
        self.pictures = self.batches = self.restarts = 0
        self.step_seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._storing = asyncio.Lock()  # pictures are numbered in the order in which they were made
        self._ending: set[asyncio.Task[None]] = set()  # batches that are over, but not in the gallery yet

    # --- Requests ---

    def start(self) -> None:
        """Start the workers."""
        for slot in self.slots:
            slot.worker.start()

    def submit(self, job: Job) -> Job:
        """Queue a job. Raises Refused if the queue is full or the server stops."""
        if self.closing:
            raise Refused(503, "stopping", "the server is stopping", retry_after=10)
        if self.unloadable is not None:
            raise Refused(503, "no_model", f"the model cannot be loaded: {self.unloadable.message}")
        if self.queued >= self.settings.queue:
            self.counts["refused"] += 1
            seconds = max(1, min(60, round(self.seconds_ahead())))
            raise Refused(429, "queue_full", f"{self.queued} jobs are waiting", "try again", retry_after=seconds)
        self.jobs[job.id] = job
        self._forget()
        self.waiting.setdefault(job.client, deque()).append(job)
        job.emit("queued", position=self.position(job))
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job: one that waits leaves the queue, one that runs stops at the next step."""
        if job.status in FINISHED:
            return
        if job.status == "queued":
            self._unqueue(job)
        else:
            for slot in self.slots:
                if job in slot.running:
                    slot.worker.send("cancel", job.id)
        self._finish(job, "cancelled", Refused(409, "cancelled", "the job was cancelled"))

    def watch(self, job: Job) -> None:
        """Have live previews of a job made from now on."""
        for slot in self.slots:
            if job in slot.running:
                slot.worker.send("watch", job.id)

    @property
    def queued(self) -> int:
        return sum(map(len, self.waiting.values()))

    @property
    def running(self) -> list[Job]:
        return [job for slot in self.slots for job in slot.running if job.status == "running"]

    @property
    def status(self) -> str:
        """ok, loading, stopping or failed."""
        if self.closing:
            return "stopping"
        if self.unloadable is not None:
            return "failed"
        return "ok" if any(slot.ready for slot in self.slots) else "loading"

    def position(self, job: Job) -> int:
        """How many jobs are before this one in the queue, if nobody else comes."""
        place = 0
        depth = max(map(len, self.waiting.values()), default=0)
        for turn in range(depth):
            for jobs in self.waiting.values():
                if turn < len(jobs):
                    if jobs[turn] is job:
                        return place
                    place += 1
        return 0

    def seconds_ahead(self) -> float:
        """An estimate of how long the queue takes."""
        seconds = max((slot.seconds for slot in self.slots), default=1.0) or 1.0
        return seconds * (1 + self.queued / self.settings.batch) / max(1, len(self.slots))

    async def close(self, seconds: float) -> None:
        """Hand back what waits, give what runs some seconds, then stop."""
        self.closing = True
        for jobs in list(self.waiting.values()):
            for job in list(jobs):
                self._unqueue(job)
                self._finish(job, "cancelled", Refused(503, "stopping", "the server is stopping", retry_after=10))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._ending or any(slot.running for slot in self.slots):
                    await asyncio.sleep(0.02)
        for job in self.running:
            self._finish(job, "cancelled", Refused(503, "stopping", "the server is stopping", retry_after=10))
        for slot in self.slots:
            slot.worker.stop()

    # --- Batches ---

    def _dispatch(self) -> None:
        """Give every worker that is free its next batch, or wait for clients that are about to come back."""
        for slot in self.slots:
            if not slot.ready or slot.running or not self.waiting:
                continue
            delay = self._delay(slot)
            if delay > 0:
                if self._timer is None:
                    self._timer = self.loop.call_later(delay, self._on_timer)
                continue
            slot.expected = 0
            self._begin(slot, self._batch())

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatch()

    def _delay(self, slot: Slot) -> float:
        """How long to wait for a fuller batch: while fewer wait than left with the last one, a share of its time."""
        if self.settings.exact or self.queued >= min(slot.expected, self.settings.batch) or self.connections() < 2:
            return 0.0
        return slot.ended + WAIT_SHARE * slot.seconds - time.monotonic()

    def _batch(self) -> list[Job]:
        """The next job in turn, and those that can share its batch; each client gives one in each round."""
        client, jobs = next(iter(self.waiting.items()))
        first = jobs[0]
        batch, size = [first], len(first.plan)
        self._unqueue(first)
        if client in self.waiting:
            self.waiting.move_to_end(client)
        joined = first.key is not None
        while joined:
            joined = False
            for jobs in list(self.waiting.values()):
                job = next((job for job in jobs if job.key == first.key), None)
                if job is not None and size + len(job.plan) <= self.settings.batch:
                    self._unqueue(job)
                    batch.append(job)
                    size += len(job.plan)
                    joined = True
        return batch

    def _begin(self, slot: Slot, jobs: list[Job]) -> None:
        slot.running, slot.begun = jobs, time.monotonic()
        self.batches += 1
        for job in jobs:
            job.status, job.begun = "running", time.time()
            job.emit("started")
            self.loop.call_later(self.settings.job_timeout, self._time_out, job)
        partials = {job.id: job.partials for job in jobs if job.partials}
        slot.worker.send("make", [(job.id, job.plan) for job in jobs], partials)
        for client in self.waiting.values():
            for job in client:
                job.emit("queued", position=self.position(job))

    def _time_out(self, job: Job) -> None:
        if job.status == "running":
            for slot in self.slots:
                if job in slot.running:
                    slot.worker.send("cancel", job.id)
            seconds = f"{self.settings.job_timeout:g}"
            self._finish(job, "failed", Refused(504, "timeout", f"the job took longer than {seconds} s"))

    def _unqueue(self, job: Job) -> None:
        jobs = self.waiting.get(job.client)
        if jobs and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self.waiting[job.client]

    def _finish(self, job: Job, status: str, error: DiffgenError | None = None) -> None:
        if job.status not in FINISHED:
            self.counts[status] += 1
            job.finish(status, error)

    def _forget(self) -> None:
        """Forget jobs that ended some time ago; their pictures stay in the gallery."""
        old = time.time() - KEEP_JOBS
        for id, job in list(self.jobs.items()):
            if job.ended is None and len(self.jobs) < 10_000:
                break
            if (job.ended or old) < old or len(self.jobs) > 2000:
                del self.jobs[id]
            else:
                break

    # --- Messages of workers ---

    def _receive(self, worker: Worker, message: tuple[Any, ...] | None) -> None:
        """Called in the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self.loop.call_soon_threadsafe(self._handle, worker, message)

    def _handle(self, worker: Worker, message: tuple[Any, ...] | None) -> None:
        slot = next(slot for slot in self.slots if slot.worker is worker)
        if message is None:
            self._lost(slot)
            return
        kind, *content = message
        if kind == "loaded":
            self.hashes[content[0]] = content[1]
            slot.ready = True
            if not self.loaded.done():
                self.loaded.set_result(None)
            self._dispatch()
        elif kind == "unloadable":
            self.unloadable = error_of(*content[0])
        elif kind == "step":
            names, done, total = content
            for job in slot.running:
                if job.id in names and job.status == "running":
                    job.step, job.steps = done, total
                    left = (time.monotonic() - slot.begun) / done * (total - done)
                    job.emit("step", done=done, total=total, eta=round(left, 2))
        elif kind == "end":
            self._end(slot, content[1])
        elif (current := self.jobs.get(content[0])) is not None and current.status == "running":
            job = current
            if kind == "preview":
                job.preview = content[1]
                job.emit("preview", png=content[1], partial=content[2])
            elif kind == "invalid":
                job.failures.append(error_of(*content[1]))
            elif kind == "picture":
                job.stores.append(self.loop.create_task(self._store(job, content[1], content[2])))

    async def _store(self, job: Job, png: bytes, record: dict[str, Any]) -> None:
        try:
            async with self._storing:
                entry = await asyncio.to_thread(self.gallery.add, png, record)
        except DiffgenError as error:
            job.failures.append(error)
            return
        self.pictures += 1
        job.entries.append(entry)
        job.warnings += [text for text in record["warnings"] if text not in job.warnings]
        job.emit("picture", **entry.as_json())

    def _end(self, slot: Slot, failure: tuple[int, str, str] | None) -> None:
        """A batch is over: the worker takes the next one while the pictures go to the gallery."""
        jobs, slot.running, slot.failures = slot.running, [], 0
        slot.ended = time.monotonic()
        slot.seconds, slot.expected = slot.ended - slot.begun, self.queued + len(jobs)
        if steps := max((job.step for job in jobs), default=0):
            self.step_seconds = slot.seconds / steps
        task = self.loop.create_task(self._complete(jobs, failure))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        self._dispatch()

    async def _complete(self, jobs: list[Job], failure: tuple[int, str, str] | None) -> None:
        for job in jobs:
            await asyncio.gather(*job.stores)
            if job.status == "running":
                error = error_of(*failure) if failure else job.failures[0] if job.failures else None
                self._finish(job, "failed" if error else "done", error)

    def _lost(self, slot: Slot) -> None:
        """The worker process is gone: its batch has failed, and another process takes its place."""
        slot.ready = False
        jobs, slot.running = slot.running, []
        slot.failures += 1
        if self.closing:
            return
        error = self.unloadable
        for job in [job for job in jobs if job.status == "running" and job.step == 0 and not job.lost]:
            job.status, job.lost = "queued", True  # the worker had ended before it was noticed
            self.waiting.setdefault(job.client, deque()).appendleft(job)
            jobs.remove(job)
        for job in jobs:
            lost = Refused(500, "worker_lost", "the process that held the model ended while it made this picture")
            self._finish(job, "failed", error or lost)
        if error is None and slot.failures > RESTARTS:
            error = self.unloadable = DiffgenError("the process that holds the model ends again and again")
        if error is not None:
            for waiting in list(self.waiting.values()):
                for job in list(waiting):
                    self._unqueue(job)
                    self._finish(job, "failed", Refused(503, "no_model", error.message))
            if not self.loaded.done():
                self.loaded.set_exception(error)
            return
        self.restarts += 1
        slot.worker = Worker(self.facts, slot.worker.device, slot.worker.dtype, slot.worker.options, self._receive)
        slot.worker.start()
