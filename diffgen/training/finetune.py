"""`diffgen.finetune`: change a model by a few pictures. No torch at import.

    run = diffgen.finetune("emoji", "my-rex/", "runs/rex", trigger="<rex>")
    diffgen.load("emoji").generate("a <rex>", loras=["runs/rex"])

It is `diffgen.train` with a job that begins with a model; `pipelines/training/finetune.py` has what the jobs share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffgen.errors import InputError, UsageError, checked_arguments
from diffgen.generation.checks import check_int
from diffgen.models.by_hash import network_hash
from diffgen.models.find import find

from . import config as configuration
from .job import JOBS
from .listener import Listener
from .run import Run, is_run, read_run
from .train import OPTIONS, checked_options, launch, tables_of

if TYPE_CHECKING:
    from .start import TrainEstimate

NAMES = tuple(name for name, kind in JOBS.items() if kind.command == "finetune")


@dataclass(frozen=True)
class FineTuneResult:
    """What a fine-tuning came to."""

    run: str  # the folder
    job: str
    step: int  # the last one
    steps: int  # of the configuration
    started_at: int  # the step that this start continued from
    held_out: float | None  # the last held-out loss of the averaged weights
    files: list[str]  # what other commands read
    seconds: float


def _check_base(run: Run, model: str) -> None:
    """Raise InputError unless a run began with that model."""
    if run.base and network_hash(find(model)) != run.base.get("sha256"):
        raise InputError(
            f"{run.folder} is a run of another base: it began with {run.base.get('name')}, not with {model}",
            "give that model, or choose another -o",
        )


@checked_arguments(*OPTIONS)
def finetune(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    job: str | None = None,
    trigger: str | None = None,
    rank: int | None = None,
    learning_rate: float | None = None,
    size: int | None = None,
    flip: bool | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    resume: bool = False,
    init: str | os.PathLike[str] | None = None,
    device: str = "auto",
    wait: bool = False,
    dry_run: bool = False,
    listener: Listener | None = None,
    stopping: AbstractContextManager[Callable[[], bool]] | None = None,
    **options: Any,
) -> FineTuneResult | TrainEstimate:
    """Fine-tune a model on a folder of pictures, or resume a run; with `dry_run`, estimate what that takes.

    model      any model that `diffgen.load` takes, except a run
    data       a folder of pictures, with captions in a.txt beside a.png or in a metadata.jsonl
    out        the folder of the run
    job        lora (by default), embedding, full or control
    trigger    a word put in front of captions that lack it, and the caption of pictures without one
    rank       of the adapter
    learning_rate, size, flip  keys of the tables [train] and [data]
    The rest is as in `diffgen.train`.

    Raises what `diffgen.train` does; InputError for data that are wrong, before a model is loaded.
    """
    values = checked_options(options)
    if rank is not None:
        check_int("--rank", rank, 1, 1024)
    if resume and is_run(Path(out)):
        _check_base(read_run(Path(out)), os.fspath(model))
    where, given = tables_of(config, Path(out), resume)
    tables = dict(given) | {"job": job or given.get("job", "lora"), "model": os.fspath(model)}
    if tables["job"] not in NAMES:
        message, hint = f"job is {tables['job']!r}", f"there are {', '.join(NAMES)}"
        raise UsageError(f"--{message}", hint) if job else InputError(f"{where}: {message}", hint)
    if rank is not None and tables["job"] != "lora":
        raise UsageError(f"--rank is for the job lora, not for {tables['job']}", "leave it out")
    changes = {"data.trigger": trigger, "adapter.rank": rank, "train.learning_rate": learning_rate}
    changes |= {"data.size": size, "data.flip": flip}
    tables = configuration.with_values(tables, {key: value for key, value in changes.items() if value is not None})
    tables = JOBS[tables["job"]].load("defaults")(tables, where)
    result: Any = launch(
        "finetune",
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
    if dry_run:
        estimate: TrainEstimate = result
        return estimate
    product = Path(out) / JOBS[tables["job"]].product
    return FineTuneResult(
        run=result.run,
        job=tables["job"],
        step=result.step,
        steps=result.steps,
        started_at=result.started_at,
        held_out=result.held_out_ema,
        files=[str(product)] if product.exists() else [],
        seconds=result.seconds,
    )
