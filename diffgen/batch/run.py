"""Run a plan with any engine, and look at what there is of it.

run("out", workers=4)                             # this machine
run("out", part=(3, 64))                          # this process: the shards 3, 67, 131, …
run("out", engine="ray", workers=(2, 32))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffgen.errors import DiffgenError, UsageError
from diffgen.generation.checks import check_int
from diffgen.images.publish import sweep
from diffgen.storage import Storage

from . import ray
from .local import Crew, in_turn, visible_gpus
from .maker import Maker, PictureMaker
from .plan import check_versions, read_plan, versions
from .shards import Shards, find_shards, make_shard

ENGINES = ("local", "ray")
MAX_WORKERS = 4096

# Indices that schedulers set: (index, first index, number of parts).
ARRAYS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "", "JOB_COMPLETIONS"),
)


def run(
    out: str | os.PathLike[str],
    *,
    engine: str = "local",
    workers: int | tuple[int, int] | None = None,
    gpus_per_worker: float | None = None,
    part: tuple[int, int] | None = None,
    address: str | None = None,
    retries: int = 3,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    maker: Maker | None = None,
    report: Callable[[Shards], None] = lambda shards: None,
) -> Shards:
    """Make the shards that are missing; returns what there is then. A finished plan is left as it is.

    workers   processes, or (smallest, largest) number for Ray; by default one for each GPU, or one
    part      (I, N): make the shards with number ≡ I mod N in this process
    retries   how often a shard is tried again after its worker died
    model     where the planned model is, if it is not where the plan says
    maker     makes the rows in this process instead of the plan's model
    report    is called after each shard

    Raises InputError (no plan, another plan's shards, other weights or versions, no cluster), CannotWrite, DiffgenError
    for shards whose workers keep dying. Rows that fail raise nothing: they are in the result's `failed`.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)} (got {engine!r})")
    if part is not None and (engine == "ray" or workers is not None):
        raise UsageError("--part makes its shards in one process", "leave --engine and --workers out")
    if address is not None and engine != "ray":
        raise UsageError("--address is for --engine ray", "add --engine ray")
    check_int("--retries", retries, 0, 10**6)
    store = Storage(out)
    plan = read_plan(store)
    check_versions(plan.about, versions(), "this machine")
    before = find_shards(plan)
    todo = before.missing if part is None else list(in_turn(before.missing, *part))
    if not todo:
        return before
    if not store.is_remote:
        sweep(store.path(""))
    stats = dict(before.stats)

    def finished(one: dict[str, Any]) -> None:
        stats[one["shard"]] = one
        report(Shards(plan, stats))

    place_of_model = os.path.abspath(model) if model and os.path.exists(model) else model or plan.model
    options: Mapping[str, Any] = {"device": device, "dtype": dtype, "offline": offline, "model": place_of_model}
    if part is not None or maker is not None:
        maker = maker or PictureMaker(plan.about, **options)
        for shard in todo:
            if shard not in find_shards(plan, [shard]).stats:  # another process may have made it meanwhile
                finished(make_shard(plan, shard, maker))
        return Shards(plan, stats)
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    least, most = workers if isinstance(workers, tuple) else (workers or len(gpus) or 1,) * 2
    if not 1 <= least <= most <= MAX_WORKERS:
        raise UsageError(f"--workers must be N or MIN-MAX from 1 to {MAX_WORKERS} (got {workers!r})")
    place = str(out) if store.is_remote else str(Path(out).resolve())
    if engine == "ray":
        share = gpus_per_worker if gpus_per_worker is not None else float(bool(gpus))
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // most)
        ray.run_shards(
            place,
            options,
            todo,
            finished,
            workers=(least, most),
            gpus=share,
            threads=threads,
            address=address,
            retries=retries,
        )
        _raise_lost(Shards(plan, stats))
    else:
        if least != most:
            raise UsageError("--workers MIN-MAX is for --engine ray", "give one number")
        Crew(place, options, most, gpus, retries).run(todo, finished)
    return Shards(plan, stats)


def _raise_lost(shards: Shards) -> None:
    """Raise DiffgenError for shards that Ray gave up."""
    if lost := shards.missing:
        named = ", ".join(map(str, lost[:20])) + (" …" if len(lost) > 20 else "")
        raise DiffgenError(
            f"Ray gave up {len(lost)} shards ({named})",
            "run the same command again; out of memory is the usual reason: fewer --workers",
        )


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(I, N) of "I/N"; of "auto", what a Slurm array or a Kubernetes indexed job says. Raises UsageError."""
    if text == "auto":
        for index, first, count in ARRAYS:
            if index in environment:
                if count not in environment:
                    raise UsageError(
                        f"--part auto: {index} is set, {count} is not", f"set {count} to the number of parts"
                    )
                numbers = environment[index], environment.get(first, "0"), environment[count]
                if not all(number.isdecimal() for number in numbers):
                    raise UsageError(f"--part auto: {index} and {count} are {numbers[0]!r} and {numbers[2]!r}")
                text = f"{int(numbers[0]) - int(numbers[1])}/{int(numbers[2])}"
                break
        else:
            named = " and ".join(index for index, _, _ in ARRAYS)
            raise UsageError(f"--part auto: {named} are not set", "write --part I/N")
    part, slash, parts = text.partition("/")
    valid = slash and part.isdecimal() and parts.isdecimal() and len(text) < 20
    if not valid or not 0 <= int(part) < int(parts):
        raise UsageError(f"--part must be I/N with I from 0 to N-1 (got {text!r})", "for example --part 0/4")
    return int(part), int(parts)


def parse_workers(text: str) -> int | tuple[int, int]:
    """The number of workers, or (smallest, largest), of "N" or "MIN-MAX". Raises UsageError."""
    least, dash, most = text.partition("-")
    if not least.isdecimal() or (dash and not most.isdecimal()) or len(text) > 20:
        raise UsageError(f"--workers must be N or MIN-MAX (got {text!r})", "for example --workers 2-8")
    return (int(least), int(most)) if dash else int(least)


def status(out: str | os.PathLike[str]) -> Shards:
    """What there is of a plan. Reads only the folder. Raises InputError."""
    return find_shards(read_plan(Storage(out)))
