"""The engine "local": worker processes on this machine, each with the model loaded once.

A worker reads numbers of shards from its stdin and answers with one line of JSON for each. When its stdin ends, because
the driver has ended in whatever way, it exits at once: what it was making has no name yet. A worker that dies is
replaced, and its shard is made by another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffgen.errors import DiffgenError, ExitCode

Report = Callable[[dict[str, Any]], None]  # gets the statistics of each shard as it is finished

STARTING = -1  # in place of a shard, while a worker loads the model
EXIT_SECONDS = 5.0  # for a worker to end after SIGTERM


@dataclass
class Crew:
    """Workers on this machine."""

    out: str
    options: Mapping[str, Any]  # device, dtype, offline, model
    workers: int = 1
    gpus: Sequence[str] = ()  # those that the workers share, in turn
    retries: int = 3  # how often a shard is tried again after its worker died
    lost: Counter[int] = field(default_factory=Counter)  # workers that died, by their shard

    def run(self, shards: Sequence[int], report: Report) -> None:
        """Make the shards. Raises what the workers raise, and DiffgenError if workers keep dying over a shard."""
        todo, events = deque(shards), queue.Queue[tuple[Worker, Any]]()
        active: dict[Worker, int] = {}
        given_up: list[int] = []
        count = min(self.workers, len(todo))
        try:
            for slot in range(count):
                active[Worker(self, slot, events)] = STARTING
            while active:
                worker, answer = events.get()
                if (shard := active.pop(worker, None)) is None:
                    continue  # it was told to end, and did
                if isinstance(answer, int):  # the worker has ended
                    self.lost[shard] += 1
                    if self.lost[shard] <= self.retries:
                        if shard >= 0:
                            todo.appendleft(shard)
                    elif shard >= 0:
                        given_up.append(shard)
                    else:
                        raise DiffgenError(f"workers cannot start (exit code {answer})", "see their messages")
                    if todo:
                        active[Worker(self, worker.slot, events)] = STARTING
                    continue
                if "error" in answer:
                    raise _error(answer["error"])
                if "ready" not in answer:
                    report(answer)
                if todo:
                    active[worker] = todo.popleft()
                    worker.make(active[worker])
                else:
                    worker.close()
        finally:
            for worker in list(active):
                worker.kill()
        if given_up:
            raise DiffgenError(
                f"workers ended {self.retries + 1} times while they made the shards {', '.join(map(str, given_up))}",
                "look at the messages of the workers; out of memory is the usual reason: fewer --workers, "
                "a smaller --batch-size in the plan",
            )


class Worker:
    """One worker process."""

    def __init__(self, crew: Crew, slot: int, events: queue.Queue[tuple[Worker, Any]]) -> None:
        self.slot = slot
        environment = os.environ.copy()
        if crew.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = crew.gpus[slot % len(crew.gpus)]
        if "OMP_NUM_THREADS" not in environment:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // crew.workers))
        words = [sys.executable, "-m", "diffgen.batch.worker", crew.out, json.dumps(dict(crew.options))]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.Queue[tuple[Worker, Any]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a line that was cut off by the end of the worker
                events.put((self, json.loads(line)))
        events.put((self, self.process.wait()))

    def make(self, shard: int) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has just died: its end is reported
            self.process.stdin.write(f"{shard}\n".encode())
            self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.process.terminate()
        try:
            self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _error(error: Mapping[str, Any]) -> DiffgenError:
    """The error that a worker reported, with its exit code."""
    caught = DiffgenError(error["message"], error["hint"])
    caught.code = ExitCode(error["code"])
    return caught


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, without importing torch."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip()]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout.split() if done.returncode == 0 else []
    return []


def in_turn(shards: Sequence[int], part: int, parts: int) -> Iterator[int]:
    """The shards of part `part` of `parts`: those with number ≡ part."""
    return (shard for shard in shards if shard % parts == part)
