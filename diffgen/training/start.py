"""Start or resume a run: check before anything is written, lock the folder, find the step to continue from.

result = execute(TrainRequest(Path("runs/digits"), config), job, Ranks("cpu"), Listener(), lambda: False)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffgen.devices import out_of_memory
from diffgen.errors import CannotWrite, InputError, OutOfMemory, UsageError
from diffgen.images.lock import locked
from diffgen.images.publish import cannot_write, publish
from diffgen.models.gate import read_header, sha256_of
from diffgen.version import __version__

from . import checkpoint
from .config import Train, differences, parse, to_dict
from .job import Job
from .listener import Listener
from .log import Log
from .loop import run_steps
from .parallel import Ranks, local
from .run import SCHEMA, Run, is_run, read_run, read_state
from .trainer import Trainer

TIMED_STEPS = 3


@dataclass(frozen=True)
class TrainRequest:
    """A run to start or to resume."""

    folder: Path
    config: Any  # of any job: it has the tables `train` and `sample`
    resume: bool = False
    init: Path | None = None  # initial weights: a run, a weights file, or a folder that the job can read
    wait: bool = False  # while another process trains in the folder


@dataclass(frozen=True)
class TrainResult:
    """What a training came to."""

    run: str  # the folder
    step: int  # the last one
    steps: int  # of the configuration
    images: int  # trained on until then
    started_at: int  # the step that this start continued from
    finished: bool
    loss: float | None  # mean since the last line of metrics.jsonl
    held_out_raw: float | None  # of the weights
    held_out_ema: float | None  # of their first average
    seconds: float


@dataclass(frozen=True)
class TrainEstimate:
    """What a training would take, measured over a few steps.

    `bytes` are of one process: weights, gradients and moments of all networks, averages, and the activations that the
    first step keeps for its backward pass. Seconds are of the steps alone, without held-out losses, sheets and
    checkpoints.
    """

    run: str
    parameters: int
    data: dict[str, Any]
    device: str
    precision: str
    processes: int
    bytes: dict[str, int]
    seconds_per_step: float
    timed_steps: int
    steps: int
    seconds: float
    dry_run: bool = True


def check_folder(folder: Path, resume: bool) -> Run | None:
    """The run in the folder, None if there is none. Raises CannotWrite if a training may not write there."""
    if is_run(folder):
        if not resume:
            raise CannotWrite(f"{folder} is already a run", "add --resume to continue it, or choose another -o")
        return read_run(folder)
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot_write(folder, error) from error
    if names:
        raise CannotWrite(f"{folder} is not empty and not a run: it has {min(names)!r}", "choose another -o")
    return None


def execute(
    request: TrainRequest, job: Job, ranks: Ranks, listener: Listener, stopping: Callable[[], bool]
) -> TrainResult:
    """Train from the beginning, or from the newest checkpoint, until the last step or until `stopping()` is true.

    Raises, from `diffgen.errors`: UsageError for a resume with another configuration, CannotWrite, InputError,
    InvalidOutput if training diverges, OutOfMemory; `parallel.Lost` if another process dies.
    """
    began = time.perf_counter()
    config: Train = request.config.train
    check_parallel(config, ranks, job)
    with contextlib.ExitStack() as stack:
        stack.enter_context(enough_memory())
        stack.enter_context(ranks.watched())

        def waiting(message: str) -> None:
            listener.warn(message)
            if stopping():
                raise KeyboardInterrupt

        def claim() -> None:
            about = describe(request, job)
            stack.enter_context(locked(request.folder, "training", waiting if request.wait else None))
            place(request, about)
            for name, data in job.files().items():
                (path := request.folder / name).parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    publish(path, data.read_bytes() if isinstance(data, Path) else data)

        trainer = Trainer(job, config, ranks)
        if request.init is not None:
            initialise(trainer, request.init)
        ranks.first(claim)
        run = read_run(request.folder)
        trainer.segments = run.segments
        start, metrics_bytes = restore(run, trainer, listener)
        listener.begin(facts_of(run, job, trainer, start))
        ranks.agree(0)  # all ranks have read before one writes
        log = Log(request.folder if ranks.main else None, listener, config, start, metrics_bytes)
        try:
            step = run_steps(trainer, run, log, start, request.config.sample.every, stopping)
        finally:
            log.close()
    return TrainResult(
        run=str(request.folder),
        step=step,
        steps=config.steps,
        images=step * config.batch_size,
        started_at=start,
        finished=step == config.steps,
        loss=log.latest.get("loss"),
        held_out_raw=log.latest.get("held_out_raw"),
        held_out_ema=log.latest.get("held_out_ema"),
        seconds=round(time.perf_counter() - began, 3),
    )


def facts_of(run: Run, job: Job, trainer: Trainer, start: int) -> dict[str, Any]:
    """What `Listener.begin` gets."""
    return {
        "run": str(run.folder),
        "job": run.job,
        "data": data_facts(job),
        "network": run.network.get("name"),
        "parameters": trainer.parameters,
        "device": str(trainer.device),
        "precision": trainer.precision,
        "processes": trainer.ranks.world,
        "batch_size": trainer.config.batch_size,
        "start": start,
        "steps": trainer.config.steps,
        "segments": list(run.segments),
        "schedule": trainer.config.schedule,
        "warmup": trainer.config.warmup,
    }


def data_facts(job: Job) -> dict[str, Any]:
    """The description of the data, for the user."""
    return {key: value for key, value in job.about()["data"].items() if key != "fingerprint"}


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Raise OutOfMemory with advice for a training where memory ends."""
    try:
        with out_of_memory():
            yield
    except OutOfMemory as error:
        raise OutOfMemory(error.message, "raise train.accumulate, or lower --batch-size") from error


def check_parallel(config: Train, ranks: Ranks, job: Job) -> None:
    """Raise UsageError if the batch or the job cannot be divided among the processes."""
    pieces = ranks.world * config.accumulate
    if config.batch_size < pieces:
        raise UsageError(
            f"a batch of {config.batch_size} cannot be divided into {pieces} parts "
            f"({ranks.world} processes, train.accumulate = {config.accumulate})",
            "raise --batch-size",
        )
    if ranks.world > 1 and job.state_dict():
        raise UsageError("this job learns from its losses, which works in one process only", "choose other times")


def describe(request: TrainRequest, job: Job) -> dict[str, Any]:
    """The content of run.json."""
    about: dict[str, Any] = {"schema": SCHEMA, **job.about(), "config": to_dict(request.config)}
    if request.init is not None:
        files = init_files(request.init)
        about["init"] = {"file": (files[0] if len(files) == 1 else request.init).name, "sha256": hash_of(files)}
    versions = {"diffgen": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return about | {"versions": versions}


def place(request: TrainRequest, about: dict[str, Any]) -> None:
    """Write run.json, or check that the present one is the same; a finished run gets more steps.

    Raises UsageError with the differences.
    """
    before = check_folder(request.folder, request.resume)
    checkpoint.sweep(request.folder)
    path = request.folder / "run.json"
    if before is None:
        publish(path, (json.dumps(about, indent=1) + "\n").encode())
        return
    present = json.loads(path.read_bytes())
    if before.job == about["job"]:  # keys that are newer than the run get their defaults
        present["config"] = to_dict(parse(before.config, path, type(request.config)))
    newest = before.latest()
    if before.segments:
        about["segments"] = list(before.segments)
    longer = _continued(present, about, newest) if before.job == about["job"] else None
    keys = (about.keys() | present.keys()) - {"versions"}
    if request.init is None and newest is not None:
        keys -= {"init"}  # the checkpoint has its own weights
    expected = longer or present
    then, now = ({key: each[key] for key in keys if key in each} for each in (expected, json.loads(json.dumps(about))))
    if changed := differences(then, now):
        hint = "remove these options, or choose another -o"
        if all(text.startswith("config.train.steps: ") for text in changed):
            hint = "a finished run continues with a larger --steps; until then, leave --steps out"
        raise UsageError(f"{request.folder} was started with another configuration: {'; '.join(changed)}", hint)
    if longer is not None:
        publish(path, (json.dumps(longer, indent=1) + "\n").encode(), overwrite=True)


def _continued(present: dict[str, Any], about: dict[str, Any], newest: Path | None) -> dict[str, Any] | None:
    """The content of run.json for a finished run that gets more steps, in a new segment; None for another run.

    `newest` is the run's newest checkpoint. Adds the segment to `about` too.
    """
    before, after = (each["config"]["train"]["steps"] for each in (present, about))
    if newest is None or int(newest.name) != before or after <= before:
        return None
    about["segments"] = [*present.get("segments", []), before]
    train = present["config"]["train"] | {"steps": after}
    return present | {"config": present["config"] | {"train": train}, "segments": about["segments"]}


def restore(run: Run, trainer: Trainer, listener: Listener) -> tuple[int, int]:
    """Restore the newest checkpoint: (its step, the length of metrics.jsonl then), or (0, 0) without one.

    Raises InputError for a checkpoint that does not fit.
    """
    warn = listener.warn if trainer.ranks.main else lambda text: None
    newest = run.latest(warn)
    if newest is None:
        return 0, 0
    state = read_state(newest)
    length, pending = state.get("metrics_bytes"), state.get("pending")
    lists = [pending.get(key) for key in ("loss", "gradient_norm")] if isinstance(pending, dict) else [None]
    numbers = all(isinstance(each, list) and all(type(n) in (int, float) for n in each) for each in lists)
    if type(length) is not int or length < 0 or not numbers:
        raise InputError(f"{newest / 'state.json'} lacks what a resume needs", "start a new run with --init")
    return trainer.restore(newest, state), length


def init_files(path: Path) -> list[Path]:
    """The weights files of a run (the average in its newest checkpoint), of a folder, or the file itself.

    Raises InputError if there are none.
    """
    if is_run(path):
        newest = read_run(path).latest()
        if newest is None:
            raise InputError(f"{path} has no checkpoint to start from", "name a run that has one")
        return [newest / "ema.safetensors"]
    if not path.is_dir():
        return [path]
    if files := sorted(path.rglob("*.safetensors")):
        return files
    raise InputError(f"{path} has no weights to start from", "name a run, a .safetensors file, or a model's folder")


def hash_of(files: list[Path]) -> str:
    """SHA-256 in hex of a weights file; for several files, of their hashes. Raises InputError for an invalid file."""
    hashes = []
    for file in files:
        read_header(file)
        hashes.append(sha256_of(file))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def initialise(trainer: Trainer, path: Path) -> None:
    """Load the initial weights from a run, a file or a folder. Raises InputError if they do not fit the networks."""
    own = trainer.model()
    if path.is_dir() and not is_run(path):
        trainer.load_model(trainer.job.first_weights(path, own))
    else:
        trainer.load_model(checkpoint.read_weights(init_files(path)[0], own))


def estimate(request: TrainRequest, job: Job, ranks: Ranks) -> TrainEstimate:
    """Measure a few steps, discard their result, and write nothing. Raises as `execute` does."""
    config: Train = request.config.train
    check_parallel(config, ranks, job)
    trainer = Trainer(job, config, ranks)
    activations: dict[int, int] = {}  # bytes by storage: one that several operations keep counts once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    with enough_memory():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.step(0)
        began = time.perf_counter()
        for k in range(1, 1 + TIMED_STEPS):
            trainer.step(k)
        trainer.check(1 + TIMED_STEPS)  # waits for the device
        seconds = (time.perf_counter() - began) / TIMED_STEPS
    frozen = [p for network in job.frozen.values() for p in network.parameters()]
    own = {p.untyped_storage().data_ptr() for p in (*trainer.weights.values(), *frozen)}
    weights = sum(local(p).numel() * p.element_size() for p in trainer.weights.values())
    sizes = ({"frozen": sum(p.nbytes for p in frozen)} if frozen else {}) | {
        "weights": weights,
        "gradients": weights,
        "moments": sum(
            local(value).nbytes
            for state in trainer.optimizer.state.values()
            for slot, value in state.items()
            if slot != "step"
        ),
        "averages": sum(value.numel() * 4 for average in trainer.averages for value in average.values),
        "activations": sum(size for pointer, size in activations.items() if pointer not in own),
    }
    return TrainEstimate(
        run=str(request.folder),
        parameters=trainer.parameters,
        data=data_facts(job),
        device=str(ranks.device),
        precision=trainer.precision,
        processes=ranks.world,
        bytes=sizes | {"total": sum(sizes.values())},
        seconds_per_step=seconds,
        timed_steps=TIMED_STEPS,
        steps=config.steps,
        seconds=seconds * config.steps,
    )
