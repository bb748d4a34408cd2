"""`diffgen.train`: from a name of data and a configuration to a run. No torch at import.

    run = diffgen.train("digits", "runs/digits", steps=1200)
    run.held_out_ema                                            # the held-out loss of the averaged weights

Options are checked first, before torch is imported; then the data are opened, the job is built, and the run starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgen import environment
from diffgen.devices import device_name
from diffgen.errors import InputError, UsageError, checked_arguments
from diffgen.generation.checks import MAX_SEED, check_int

from . import config as configuration
from .job import JOBS
from .listener import Listener
from .run import is_run, read_run

if TYPE_CHECKING:
    from .data.dataset import TrainingData
    from .start import TrainEstimate, TrainResult

# Options that replace a key of the configuration's table [train], with their range if they are numbers.
OPTIONS: dict[str, tuple[int, int] | None] = {
    "steps": (1, 10**9),
    "batch_size": (1, 10**6),
    "seed": (0, MAX_SEED),
    "checkpoint_every": (1, 10**9),
    "compile": None,
    "parallel": None,
}
# More of them, of `train` alone, with their keys.
KEYS = {
    "size": "data.size",
    "flip": "data.flip",
    "crop": "data.crop",
    "colour": "data.colour",
    "augment": "data.augment",
    "learning_rate": "train.learning_rate",
}


@checked_arguments(*OPTIONS, *KEYS)
def train(
    data: str | os.PathLike[str] | TrainingData,
    out: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    resume: bool = False,
    init: str | os.PathLike[str] | None = None,
    device: str = "auto",
    wait: bool = False,
    dry_run: bool = False,
    listener: Listener | None = None,
    stopping: AbstractContextManager[Callable[[], bool]] | None = None,
    **options: Any,
) -> TrainResult | TrainEstimate:
    """Train a diffusion model from scratch, or resume a run; with `dry_run`, estimate what that takes.

    data       `digits`, a folder of pictures, or an open data set
    out        the folder of the run
    config     a TOML file, or its tables; what they do not set has the defaults of `training.config`
    resume     continue from the newest checkpoint, if the folder is a run
    init       a run, a weights file or a model's folder with the initial weights
    device     auto, cpu, cuda, cuda:N, mps or xpu
    wait       wait while another process trains in the folder
    dry_run    run a few steps, return a TrainEstimate, and write nothing
    listener   gets reports of progress
    stopping   a context manager, entered before the first step, of a function: once it returns True, the training
               finishes its step, writes a checkpoint and returns
    options    steps, batch_size, seed, checkpoint_every, compile, parallel, learning_rate: they replace keys of the
               table [train]; size, flip, crop, colour, augment: keys of [data]

    Raises, from `diffgen.errors`: UsageError for an invalid option, and for a resume with another configuration;
    InputError for an invalid configuration or data; CannotWrite, InvalidOutput if the training diverges, OutOfMemory.
    Under torchrun also `parallel.Lost`, if another process ends, and FailedElsewhere, if rank 0 fails.
    """
    values = checked_options(options)
    where, tables = tables_of(config, Path(out), resume)
    return launch(
        "train",
        data,
        Path(out),
        where,
        tables,
        values,
        resume=resume,
        init=init,
        device=device,
        wait=wait,
        dry_run=dry_run,
        listener=listener,
        stopping=stopping,
        by_file=config is not None,
    )


def launch(
    command: str,
    data: str | os.PathLike[str] | TrainingData,
    folder: Path,
    where: str,
    tables: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    resume: bool,
    init: str | os.PathLike[str] | None,
    device: str,
    wait: bool,
    dry_run: bool,
    listener: Listener | None,
    stopping: AbstractContextManager[Callable[[], bool]] | None,
    by_file: bool,
) -> TrainResult | TrainEstimate:
    """Start or resume a run of a job of that command, from the tables of its configuration.

    `where` names their source in errors, and `by_file` says that the user gave one. `values` are checked options: they
    replace keys of the configuration. The rest is as in `train`.
    """
    device, listener = device_name(device), listener or Listener()
    chosen = _configuration(where, tables, values, command)
    kind = JOBS[chosen.job]

    environment.prepare()
    from . import start
    from .parallel import Ranks

    request = start.TrainRequest(folder, chosen, resume, None if init is None else Path(init), wait)
    if not dry_run and os.environ.get("RANK", "0") == "0":
        start.check_folder(folder, resume)  # before the data are opened, which can take long
    ranks = Ranks(device)
    try:
        pictures = _open(data, chosen, where, listener)
        for text in pictures.notes:
            listener.note(text)
        if pictures.captions is not None and not kind.captions:
            listener.note("the captions are not used: this job trains on the pictures alone")
        progress = _progress(listener, "encoding pictures")
        job = kind.load("job")(chosen, pictures, where, device=ranks.device, progress=progress)
        for text in job.notes:
            listener.note(text)
        if by_file and "batch_size" not in values:  # else the option is invalid, as `execute` reports
            with _blame(where):
                start.check_parallel(chosen.train, ranks, job)
        if dry_run:
            return start.estimate(request, job, ranks)
        with stopping or contextlib.nullcontext(lambda: False) as stop:
            return start.execute(request, job, ranks, listener, stop)
    finally:
        ranks.leave()


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set, in their ranges. Raises UsageError."""
    values = {name: value for name, value in options.items() if value is not None}
    for name, limits in OPTIONS.items():
        if limits is not None and name in values:
            check_int(f"--{name.replace('_', '-')}", values[name], *limits)
    if (parallel := values.get("parallel")) not in (None, "ddp", "fsdp"):
        raise UsageError(f"--parallel must be ddp or fsdp (got {parallel!r})")
    return values


def tables_of(
    config: str | os.PathLike[str] | Mapping[str, Any] | None, folder: Path, resume: bool
) -> tuple[str, Mapping[str, Any]]:
    """(its source, the tables of a configuration); a run that is resumed without one has its own. Raises InputError."""
    if isinstance(config, Mapping):
        return "the configuration", config
    if config is not None:
        return os.fspath(config), configuration.read_toml(Path(config))
    if resume and is_run(folder):
        return str(folder / "run.json"), read_run(folder).config
    return "the configuration", {}


def _configuration(where: str, tables: Mapping[str, Any], values: Mapping[str, Any], command: str) -> Any:
    """The configuration of the tables, with options in the place of its values. Raises InputError."""
    job = tables.get("job", "pixels")
    jobs = [name for name, kind in JOBS.items() if kind.command == command]
    if not isinstance(job, str) or job not in jobs:
        other = isinstance(job, str) and job in JOBS
        hint = f"start it with diffgen {JOBS[job].command}" if other else f"there are {', '.join(jobs)}"
        raise InputError(f"{where}: job is {job!r}", hint)
    cls = JOBS[job].load("config")
    configuration.parse(tables, where, cls)  # so that an error in the file names the file
    changes = {KEYS.get(name, f"train.{name}"): value for name, value in values.items()}
    for key, value in changes.items():
        flag = f"--{key.partition('.')[2].replace('_', '-')}"
        try:
            configuration.parse(configuration.with_values({"job": job}, {key: value}), flag, cls)
        except InputError as error:
            reason = error.message.removeprefix(f"{flag}: ").removeprefix(f"{key} ")
            if reason.startswith("unknown key"):
                reason = f"is not for the job {job!r}"
            raise UsageError(f"{flag} {reason}") from error
    return configuration.parse(configuration.with_values(tables, changes), where, cls)


def _open(data: str | os.PathLike[str] | TrainingData, config: Any, where: str, listener: Listener) -> TrainingData:
    """The data, with size and channels of the configuration. Raises InputError."""
    if not isinstance(data, str | os.PathLike):
        return data
    progress = _progress(listener, "reading pictures")
    if JOBS[config.job].data:
        opened: TrainingData = JOBS[config.job].load("data")(os.fspath(data), config, where, progress)
        return opened
    from .data import open_training_data

    c = config.data
    with _blame(f"{where}: data.size, data.channels"):
        return open_training_data(
            data, size=c.size, channels=c.channels, memory=c.memory, cache=c.cache, progress=progress
        )


def _progress(listener: Listener, text: str) -> Callable[[int, int], None]:
    return lambda done, total: listener.progress(done, total, text)


@contextlib.contextmanager
def _blame(where: str) -> Iterator[None]:
    """Raise InputError, naming a part of the configuration, for the UsageError of a function that got its values."""
    try:
        yield
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error
