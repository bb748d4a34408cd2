"""From an order to a run: what is checked before anything is written, who may write, where it goes on.

result = run(Order(Path("runs/digits"), Config(), {...}), make_job, listener)
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
from diffgen.images.publish import cannot_write, publish
from diffgen.models.gate import read_header, sha256_of
from diffgen.version import __version__

from . import checkpoint
from .config import Train, differences, parse, to_dict
from .job import Job
from .log import Listener, Log
from .loop import train
from .parallel import Ranks, local
from .run import SCHEMA, Run, is_run, read_run, read_state
from .trainer import Trainer

TIMED_STEPS = 3


@dataclass(frozen=True)
class Order:
    """What is asked for: `config` has a `train` and a `sample` table, whatever its job."""

    folder: Path
    config: Any
    resume: bool = False
    init: Path | None = None  # a run, a weights file, or a folder that the job can read, with the first weights
    device: str = "auto"


def check_folder(folder: Path, resume: bool) -> Run | None:
    """The run that is in the folder, None if there is none. Raises CannotWrite for what may not be written to."""
    if is_run(folder):
        if not resume:
            raise CannotWrite(f"{folder} is a run already", "add --resume to go on with it, or choose another -o")
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from training in it. Raises CannotWrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back after a kill -9 too
    except ImportError:  # Windows
        pass
    except OSError as error:
        os.close(descriptor)
        raise CannotWrite(f"another process is training in {folder}", "wait for it, or choose another -o") from error
    try:
        yield
    finally:
        os.close(descriptor)


def run(order: Order, job: Job, ranks: Ranks, listener: Listener, stopping: Callable[[], bool]) -> dict[str, Any]:
    """Train, from the start or from where the run is; what came of it.

    Raises, from `diffgen.errors`: UsageError for a resume with another configuration, CannotWrite, InputError,
    InvalidOutput if training diverges, OutOfMemory; `parallel.Lost` if another process dies.
    """
    began = time.perf_counter()
    config: Train = order.config.train
    check_parallel(config, ranks, job)
    with contextlib.ExitStack() as stack:
        stack.enter_context(enough_memory())
        stack.enter_context(ranks.watched())

        def claim() -> None:
            about = describe(order, job)
            stack.enter_context(locked(order.folder))
            place(order, about)
            for name, data in job.files().items():
                (path := order.folder / name).parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    publish(path, data)

        trainer = Trainer(job, config, ranks)
        if order.init is not None:
            initialise(trainer, order.init)
        ranks.first(claim)
        here = read_run(order.folder)
        start, metrics_bytes = go_on(here, trainer, listener)
        ranks.agree(0)  # all have read before anything is written
        log = Log(order.folder if ranks.main else None, listener, config.batch_size, start, metrics_bytes)
        try:
            step = train(trainer, here, log, start, order.config.sample.every, stopping)
        finally:
            log.close()
    said = {key: log.latest.get(key) for key in ("loss", "held_out_raw", "held_out_ema")}
    return {
        "run": str(order.folder),
        "step": step,
        "steps": config.steps,
        "images": step * config.batch_size,
        "started_at": start,
        "finished": step == config.steps,
        **said,
        "seconds": round(time.perf_counter() - began, 3),
    }


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    try:
        with out_of_memory():
            yield
    except OutOfMemory as error:
        raise OutOfMemory(error.message, "raise train.accumulate, or lower --batch-size") from error


def check_parallel(config: Train, ranks: Ranks, job: Job) -> None:
    """Raises UsageError for what cannot be cut into so many parts."""
    pieces = ranks.world * config.accumulate
    if config.batch_size < pieces:
        raise UsageError(
            f"a batch of {config.batch_size} cannot be cut into {pieces} parts "
            f"({ranks.world} processes, train.accumulate = {config.accumulate})",
            "raise --batch-size",
        )
    if ranks.world > 1 and job.state_dict():
        raise UsageError("this job learns from its losses, which works in one process only", "choose other times")


def describe(order: Order, job: Job) -> dict[str, Any]:
    """run.json."""
    about: dict[str, Any] = {"schema": SCHEMA, **job.about(), "config": to_dict(order.config)}
    if order.init is not None:
        files = init_files(order.init)
        about["init"] = {"file": (files[0] if len(files) == 1 else order.init).name, "sha256": hash_of(files)}
    versions = {"diffgen": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return about | {"versions": versions}


def place(order: Order, about: dict[str, Any]) -> None:
    """Write run.json, or find that the one that is there says the same. Raises UsageError with what differs."""
    before = check_folder(order.folder, order.resume)
    checkpoint.sweep(order.folder)
    path = order.folder / "run.json"
    if before is None:
        publish(path, (json.dumps(about, indent=1) + "\n").encode())
        return
    said = json.loads(path.read_bytes())
    if before.job == about["job"]:  # a key that is newer than the run has its default
        said["config"] = to_dict(parse(before.config, path, type(order.config)))
    keys = (about.keys() | said.keys()) - {"versions"}
    if order.init is None and before.latest() is not None:
        keys -= {"init"}  # its weights are in the checkpoint
    then, now = ({key: each[key] for key in keys if key in each} for each in (said, json.loads(json.dumps(about))))
    if changed := differences(then, now):
        raise UsageError(
            f"{order.folder} was begun with another configuration: {'; '.join(changed)}",
            "leave out what differs, or choose another -o",
        )


def go_on(here: Run, trainer: Trainer, listener: Listener) -> tuple[int, int]:
    """(step to go on from, length of metrics.jsonl there). Raises InputError for a checkpoint that does not fit."""
    warn = listener.warn if trainer.ranks.main else lambda text: None
    newest = here.latest(warn)
    if newest is None:
        return 0, 0
    state = read_state(newest)
    written, pending = state.get("metrics_bytes"), state.get("pending")
    lists = [pending.get(key) for key in ("loss", "gradient_norm")] if isinstance(pending, dict) else [None]
    numbers = all(isinstance(one, list) and all(type(n) in (int, float) for n in one) for one in lists)
    if type(written) is not int or written < 0 or not numbers:
        raise InputError(f"{newest / 'state.json'} does not say how to go on", "begin a new run with --init")
    return trainer.restore(newest, state), written


def init_files(path: Path) -> list[Path]:
    """The weights files meant by a run (its average in the newest checkpoint), by a folder, or by a file.

    Raises InputError where there are none.
    """
    if is_run(path):
        newest = read_run(path).latest()
        if newest is None:
            raise InputError(f"{path} has no checkpoint to begin with", "name a run that has one")
        return [newest / "ema.safetensors"]
    if not path.is_dir():
        return [path]
    if found := sorted(path.rglob("*.safetensors")):
        return found
    raise InputError(f"{path} has no weights to begin with", "name a run, a .safetensors file, or a model's folder")


def hash_of(files: list[Path]) -> str:
    """SHA-256 in hex of a weights file; of several, of their hashes. Raises InputError for what is no weights file."""
    hashes = []
    for file in files:
        read_header(file)
        hashes.append(sha256_of(file))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def initialise(trainer: Trainer, path: Path) -> None:
    """Begin with the weights of a run, a file or a folder, which must fit the networks. Raises InputError."""
    own = trainer.model()
    if path.is_dir() and not is_run(path):
        trainer.load_model(trainer.job.first_weights(path, own))
    else:
        trainer.load_model(checkpoint.read(init_files(path)[0], own))


def estimate(order: Order, job: Job, ranks: Ranks) -> dict[str, Any]:
    """What the run would need, after a few steps whose result is thrown away; nothing is written.

    Bytes are of one process: weights, gradients and moments of all networks, averages, and what the forward pass of
    the first step keeps for the backward pass. Seconds are of the steps alone, without losses on held-out data, grids
    and checkpoints.
    """
    config: Train = order.config.train
    check_parallel(config, ranks, job)
    trainer = Trainer(job, config, ranks)
    kept: dict[int, int] = {}  # bytes by storage: one that several operations keep counts once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with enough_memory():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.step(0)
        began = time.perf_counter()
        for k in range(1, 1 + TIMED_STEPS):
            trainer.step(k)
        trainer.recent(1 + TIMED_STEPS)  # waits for the device
        seconds = (time.perf_counter() - began) / TIMED_STEPS
    own = {p.untyped_storage().data_ptr() for p in trainer.weights.values()}
    weights = sum(local(p).numel() * p.element_size() for p in trainer.weights.values())
    sizes = {
        "weights": weights,
        "gradients": weights,
        "moments": 2 * weights,
        "averages": sum(value.numel() * 4 for average in trainer.averages for value in average.values),
        "activations": sum(size for pointer, size in kept.items() if pointer not in own),
    }
    return {
        "run": str(order.folder),
        "parameters": sum(p.numel() for p in trainer.weights.values()),
        "data": {key: value for key, value in job.about()["data"].items() if key != "fingerprint"},
        "device": str(ranks.device),
        "precision": str(trainer.dtype).removeprefix("torch."),
        "processes": ranks.world,
        "bytes": sizes | {"total": sum(sizes.values())},
        "seconds_per_step": seconds,
        "timed_steps": TIMED_STEPS,
        "steps": config.steps,
        "seconds": seconds * config.steps,
        "dry_run": True,
    }
