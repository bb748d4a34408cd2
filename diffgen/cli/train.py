"""diffgen train: a diffusion model from scratch."""

from __future__ import annotations

import os
import shlex
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

import diffgen
from diffgen.errors import FailedElsewhere
from diffgen.training.listener import Listener

from .options import Device, Wait, option
from .output import Debug, Json, Output, Quiet, UnfinishedError, time_text
from .signals import first_signal, interruptible

EXAMPLES = """
Examples:

  diffgen train digits -o runs/digits

  diffgen train digits -o runs/digits --resume

  diffgen train digits -o runs/digits --resume --steps 10000

  diffgen train pictures/ -o runs/mine --size 32 --flip --augment 0.15

  diffgen train pictures/ -o runs/mine --config samples/configs/digits.toml --steps 20000

  torchrun --nproc-per-node 2 -m diffgen train pictures/ -o runs/mine
"""

RUN, TRAINING, DATA = "Run", "Training", "Pictures"
SILENCE = 10.0  # seconds between two lines where there is no bar


Out = Annotated[str, option(RUN, "The folder of the run.", "--out", "-o", "--output", metavar="RUN")]
Config = Annotated[str | None, option(RUN, "The configuration; see samples/.", metavar="FILE.toml")]
Resume = Annotated[bool, option(RUN, "Continue from the newest checkpoint.", "--resume")]
Init = Annotated[
    str | None, option(RUN, "Start from the weights of another run, or of a model.", metavar="RUN|FILE|FOLDER")
]
CheckpointEvery = Annotated[int | None, option(RUN, "Steps between checkpoints.", metavar="N")]
DryRun = Annotated[bool, option(RUN, "Estimate memory and time from a few steps; write nothing.", "--dry-run")]
Steps = Annotated[int | None, option(TRAINING, "Updates of the weights.")]
BatchSize = Annotated[int | None, option(TRAINING, "Pictures a step, of all processes together.")]
Seed = Annotated[int | None, option(TRAINING, "Same seed, same machine: same bytes. \\[0]")]
LearningRate = Annotated[float | None, option(TRAINING, "Learning rate. \\[0.001]", metavar="X")]
Compiled = Annotated[bool | None, option(TRAINING, "Use torch.compile.", "--compile/--no-compile")]
Parallel = Annotated[
    str | None, option(TRAINING, "With torchrun: copies of the network, or parts.", metavar="ddp|fsdp")
]


def train(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="`digits`; a folder of pictures (subfolders are classes); MNIST's or CIFAR's folder; .npz; .parquet",
        ),
    ],
    out: Out,
    config: Config = None,
    resume: Resume = False,
    init: Init = None,
    checkpoint_every: CheckpointEvery = None,
    dry_run: DryRun = False,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    size: Annotated[
        int | None, option(DATA, "Scale and crop pictures to this side. \\[their own]", metavar="N")
    ] = None,
    flip: Annotated[bool | None, option(DATA, "Mirror half of the pictures.", "--flip/--no-flip")] = None,
    crop: Annotated[int | None, option(DATA, "Shift pictures by up to N pixels. \\[0]", metavar="N")] = None,
    colour: Annotated[float | None, option(DATA, "Vary brightness, contrast, saturation. \\[0]", metavar="0…1")] = None,
    augment: Annotated[
        float | None, option(DATA, "For few pictures: ADA's changes, this often. \\[0]", metavar="0…1")
    ] = None,
    device: Device = "auto",
    compiled: Compiled = None,
    parallel: Parallel = None,
    wait: Wait = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    options: dict[str, Any] = {
        "config": config,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "learning_rate": learning_rate,
        "size": size,
        "flip": flip,
        "crop": crop,
        "colour": colour,
        "augment": augment,
        "checkpoint_every": checkpoint_every,
        "compile": compiled,
        "parallel": parallel,
        "resume": resume,
        "init": init,
        "device": device,
        "wait": wait,
        "dry_run": dry_run,
    }
    run_training("train", partial(diffgen.train, data, out, **options), out, dry_run, json, quiet, debug)


def run_training(
    command: str, start: Callable[..., Any], out: str, dry_run: bool, json: bool, quiet: bool, debug: bool
) -> None:
    """Call `start` with a listener that shows the training, and print its result."""
    rank = int(os.environ.get("RANK", "0"))
    say = Output(command, json, quiet or rank > 0)
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries; ours are printed
        threading.excepthook = lambda args: None  # TensorBoard's writing thread: the log raises its error
    try:
        with say.progress(command) as bar:
            result = start(listener=TrainingScreen(say, bar), stopping=interruptible())
    except FailedElsewhere as error:
        raise typer.Exit(error.code) from error
    document = asdict(result)
    if first_signal() is not None:
        say.note(f"saved at step {document['step']}: to continue, add --resume to the same command")
        raise UnfinishedError(KeyboardInterrupt(), document)
    if not dry_run and document["started_at"] == document["steps"]:
        say.note(f"{out} is finished: all {document['steps']} steps are done; a larger --steps continues it")
    if rank == 0:
        say.result(document, _estimate(document) if dry_run else [out])


def _estimate(result: dict[str, Any]) -> list[str]:
    sizes = result["bytes"]
    parts = ", ".join(f"{name} {_size(n)}" for name, n in sizes.items() if name != "total")
    return [
        f"data        {_data(result['data'])}",
        f"parameters  {result['parameters']:,}",
        f"memory      about {_size(sizes['total'])} on {result['device']} ({parts})",
        f"time        about {time_text(result['seconds'])} for {result['steps']} steps of "
        f"{result['seconds_per_step']:.3g} s in {result['precision']}, from {result['timed_steps']} timed steps",
    ]


def _data(data: dict[str, Any]) -> str:
    """The data in words; jobs on captions have no classes."""
    height, width = data["size"]
    classes = f", {len(data['classes'])} classes" if data.get("classes") else ""
    channels = {1: "grey", 3: "RGB", 4: "RGBA"}[data["channels"]]
    return f"{data['name']}: {data['count']:,} pictures, {width}x{height}, {channels}{classes}"


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


class TrainingScreen(Listener):
    """Shows a training: a bar on a terminal; elsewhere a line now and then."""

    def __init__(self, say: Output, bar: Callable[..., None] | None) -> None:
        self.say, self.bar = say, bar
        self.text = "train"
        self.began = self.last_line = time.monotonic()
        self.first: int | None = None  # the first step of this start

    def note(self, text: str) -> None:
        self.say.note(text)

    def warn(self, text: str) -> None:
        self.say.warn(text)

    def begin(self, facts: dict[str, Any]) -> None:
        run, start, steps, world = facts["run"], facts["start"], facts["steps"], facts["processes"]
        if start == steps:
            return
        network = f"{facts['network']}, " if facts["network"] else ""
        processes = f", {world} processes" if world > 1 else ""
        self.note(f"data     {_data(facts['data'])}")
        self.note(f"network  {network}{facts['parameters']:,} parameters")
        self.note(f"device   {facts['device']}, {facts['precision']}, {facts['batch_size']} pictures a step{processes}")
        self.note(f"steps    {start + 1} to {steps}")
        self.note(f"run      {run}: samples/ has grids of pictures, curve.png the losses")
        self.note(f"         in a browser: tensorboard --logdir {shlex.quote(run)}")
        if start in facts["segments"]:
            again = f"rises again over {facts['warmup']} steps and falls to 0 at step {steps}"
            rate = "stays as it was" if facts["schedule"] == "constant" else again
            self.note(f"the finished run continues from step {start} to {steps}: the learning rate {rate}")

    def progress(self, done: int, total: int, text: str) -> None:
        if self.bar is not None:
            self.bar(done, total, text)

    def step(self, step: int, steps: int) -> None:
        if self.first is None:
            self.first, self.began = step, time.monotonic()
        if self.bar is not None:
            self.bar(step, steps, self.text)

    def losses(self, line: dict[str, Any]) -> None:
        step, steps, now = line["step"], line["steps"], time.monotonic()
        if "loss" not in line:
            raw, average = line["held_out_raw"], line["held_out_ema"]
            self.note(f"step {step}: held-out loss {raw:.4f}, of the average {average:.4f}")
            return
        self.text = f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s"
        if self.bar is None and (now - self.last_line >= SILENCE or step == steps):
            self.last_line = now
            left = (now - self.began) / max(1, step - (self.first or 0)) * (steps - step)
            self.note(f"step {step} of {steps}: {self.text}, {time_text(left)} left")
