"""Trainings of a tiny network on the digits, each in a process of its own that can be killed.

The processes are forked from one that has imported torch: a start takes no time.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

CONFIG = """
[data]
flip = true
[network]
name = "unet"
width = 8
multipliers = [1, 2]
blocks = 1
attention = [false, true]
head_width = 8
dropout = {dropout}
[train]
steps = {steps}
batch_size = 16
warmup = 10
ema = [0.1, 0.05]
log_every = {log_every}
held_out_every = 20
checkpoint_every = 10
[sample]
every = 20
count = 3
steps = 2
"""

FOREVER = 10**6  # steps


def write_config(folder: Path, dropout: float = 0.1, steps: int = 40, log_every: int = 7) -> Path:
    path = folder / f"{steps}-{dropout}.toml"
    path.write_text(CONFIG.format(dropout=dropout, steps=steps, log_every=log_every))
    return path


def warm() -> multiprocessing.context.ForkServerContext:
    """Processes of this context are forked from a server that has imported what a training needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffgen.training.start", "diffgen.training.pixels", "torch._dynamo"])
    return context


def command(
    args: Sequence[str], folder: str, environment: dict[str, str], largest_file: int | None
) -> None:  # in the new process
    os.chdir(folder)
    os.environ.update(environment)
    rank = environment.get("RANK", "")
    for descriptor, name in ((1, f"out{rank}"), (2, f"err{rank}")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["diffgen", *args]
    from diffgen.cli import main

    main()


def start(
    folder: Path, *args: object, environment: dict[str, str] | None = None, largest_file: int | None = None
) -> BaseProcess:
    """`diffgen ARGS` in that folder; its output goes to the files out and err there."""
    process = warm().Process(target=command, args=([*map(str, args)], str(folder), environment or {}, largest_file))
    process.start()
    return process


def run(folder: Path, *args: object, largest_file: int | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `diffgen ARGS` in that folder."""
    process = start(folder, *args, largest_file=largest_file)
    process.join(120)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode, (folder / "out").read_text(), (folder / "err").read_text()


def wait(process: BaseProcess, until: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition is true; the process must be alive until then."""
    end = time.monotonic() + seconds
    while not until():
        assert process.is_alive(), "it ended before"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run that promises the same bytes, by its name."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in ("timing.jsonl", ".lock") and "tensorboard" not in path.parts
    }
