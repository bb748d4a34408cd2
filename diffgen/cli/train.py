"""diffgen train: a diffusion model from scratch."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffgen import environment
from diffgen.devices import device_name
from diffgen.errors import InputError, UsageError
from diffgen.generation.options import MAX_SEED, check_int
from diffgen.pipelines.training.config import AutoencoderConfig, LatentConfig
from diffgen.training import config as configuration
from diffgen.training.run import is_run, read_run

from .output import Debug, Json, Output, Quiet, UnfinishedError, time_text
from .signals import interruptible

if TYPE_CHECKING:
    from diffgen.training.data.dataset import DataSet
    from diffgen.training.job import Job
    from diffgen.training.parallel import Ranks

EXAMPLES = """
Examples:

  diffgen train digits -o runs/digits

  diffgen train digits -o runs/digits --resume

  diffgen train pictures/ -o runs/mine --config samples/configs/digits.toml --steps 20000

  torchrun --nproc-per-node 2 -m diffgen train pictures/ -o runs/mine
"""

RUN, TRAINING, OUTPUT = "Run", "Training", "Output"
KINDS = {"pixels": configuration.Config, "autoencoder": AutoencoderConfig, "latents": LatentConfig}  # by job
SILENCE = 10.0  # seconds between two lines where no bar can be shown


def train(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="`digits`, or a folder of pictures; subfolders are classes.")
    ],
    out: Annotated[
        str,
        typer.Option("--out", "-o", "--output", metavar="RUN", help="The folder of the run.", rich_help_panel=RUN),
    ],
    config: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="The configuration; see samples/.", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=RUN)
    ] = False,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|FILE|FOLDER", help="Begin with the weights of another run, or of a model.", rich_help_panel=RUN
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between checkpoints.", rich_help_panel=RUN)
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it needs, by a few steps; write nothing.", rich_help_panel=RUN),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures a step, of all processes together.", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same machine: same bytes. \\[0]", rich_help_panel=TRAINING)
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:N]|mps|xpu", help="Where to compute.", rich_help_panel=TRAINING)
    ] = "auto",
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Use torch.compile.", rich_help_panel=TRAINING, show_default=False),
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="ddp|fsdp", help="With torchrun: copies of the network, or parts.", rich_help_panel=TRAINING
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a diffusion model from scratch: of pixels or, by its configuration, of latents with captions."""
    rank = int(os.environ.get("RANK", "0"))
    say = Output("train", json, quiet or rank > 0)
    device, folder = device_name(device), Path(out)
    flags = {
        "train.steps": steps if steps is None else check_int("--steps", steps, 1, 10**9),
        "train.batch_size": batch_size if batch_size is None else check_int("--batch-size", batch_size, 1, 10**6),
        "train.seed": seed if seed is None else check_int("--seed", seed, 0, MAX_SEED),
        "train.checkpoint_every": checkpoint_every
        if checkpoint_every is None
        else check_int("--checkpoint-every", checkpoint_every, 1, 10**9),
        "train.compile": compiled,
        "train.parallel": parallel,
    }
    if parallel not in (None, "ddp", "fsdp"):
        raise UsageError(f"--parallel must be ddp or fsdp (got {parallel!r})")
    given = {key: value for key, value in flags.items() if value is not None}
    where, chosen = _configuration(config, given, folder, resume)

    environment.prepare()
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries; ours are printed
        threading.excepthook = lambda args: None  # TensorBoard's writing thread; the log raises what it met
    from diffgen.training import start
    from diffgen.training.data import open_data
    from diffgen.training.parallel import Elsewhere, Ranks

    order = start.Order(folder, chosen, resume, None if init is None else Path(init), device)
    if rank == 0 and not dry_run:
        start.check_folder(folder, resume)  # before the data is opened, which can take its time
    ranks = Ranks(device)
    try:
        with say.progress("reading pictures") as on_picture:
            size, channels, memory = chosen.data.size, chosen.data.channels, chosen.data.memory
            with _of_the_file(f"{where}: data.size, data.channels"):
                pictures = open_data(data, size=size, channels=channels, memory=memory, progress=on_picture)
        for text in pictures.notes:
            say.note(text)
        if pictures.captions is not None and chosen.job != "latents":
            say.note("the captions are not used: this job trains on the pictures alone")
        job = _job(chosen, pictures, where, ranks, say)
        if config and not batch_size:  # else the command line is wrong, as `start` will say
            with _of_the_file(where):
                start.check_parallel(chosen.train, ranks, job)
        if dry_run:
            result = start.estimate(order, job, ranks)
            if ranks.main:
                say.result(result, _estimated(result))
            return
        with interruptible() as stopping, say.progress("train") as bar:
            result = start.run(order, job, ranks, Screen(say, bar, chosen.train.steps), stopping)
            if stopping():
                raise UnfinishedError(KeyboardInterrupt(), result)
    except Elsewhere as error:
        raise typer.Exit(error.code) from error
    finally:
        ranks.leave()
    if result["started_at"] == result["steps"]:
        say.note(f"{out} is finished: all {result['steps']} steps are done")
    if ranks.main:
        say.result(result, [out])


@contextlib.contextmanager
def _of_the_file(where: str) -> Iterator[None]:
    """What Python calls a wrong argument is here in the configuration. Raises InputError."""
    try:
        yield
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from error


def _job(chosen: Any, pictures: DataSet, where: str, ranks: Ranks, say: Output) -> Job:
    """The job that a configuration is of. Raises InputError for what does not go together."""
    if chosen.job == "pixels":
        from diffgen.training.pixels import PixelJob

        return PixelJob(chosen, pictures, where)
    if chosen.job == "autoencoder":
        from diffgen.pipelines.training.autoencoder import AutoencoderJob

        return AutoencoderJob(chosen, pictures, where)
    from diffgen.pipelines.training.latents import LatentJob

    with say.progress("encoding pictures") as on_picture:
        job = LatentJob(chosen, pictures, where, device=ranks.device, progress=on_picture)
    for text in job.notes:
        say.note(text)
    return job


def _configuration(file: str | None, given: dict[str, Any], folder: Path, resume: bool) -> tuple[str, Any]:
    """(where it comes from, the configuration, of its job's kind). Flags win over the file; a run that is resumed
    without a file has its own configuration below the flags."""
    if file is not None:
        where, tables = file, configuration.read(Path(file))
    elif resume and is_run(folder):
        where, tables = str(folder / "run.json"), read_run(folder).config
    else:
        where, tables = "the configuration", {}
    job = tables.get("job", "pixels")
    if not isinstance(job, str) or job not in KINDS:
        raise InputError(f"{where}: job is {job!r}", f"there are {', '.join(KINDS)}")
    configuration.parse(tables, where, KINDS[job])  # what is wrong in the file is said of the file
    return where, configuration.parse(configuration.with_values(tables, given), where, KINDS[job])


def _estimated(result: dict[str, Any]) -> list[str]:
    data, sizes = result["data"], result["bytes"]
    height, width = data["size"]
    classes = f", {len(data['classes'])} classes" if data["classes"] else ""
    parts = ", ".join(f"{name} {_size(n)}" for name, n in sizes.items() if name != "total")
    return [
        f"data        {data['name']}: {data['count']} pictures, {width}x{height}, {data['channels']} channels{classes}",
        f"parameters  {result['parameters']:,}",
        f"memory      about {_size(sizes['total'])} on {result['device']} ({parts})",
        f"time        about {time_text(result['seconds'])} for {result['steps']} steps of "
        f"{result['seconds_per_step']:.3g} s in {result['precision']}, by {result['timed_steps']} that were timed",
    ]


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


class Screen:
    """What a person sees of a training: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, say: Output, bar: Callable[..., None] | None, steps: int) -> None:
        self.note, self.warn = say.note, say.warn
        self.bar, self.steps = bar, steps
        self.text = "train"
        self.began = self.told = time.monotonic()
        self.first: int | None = None

    def moved(self, step: int) -> None:
        self.first = step - 1 if self.first is None else self.first
        if self.bar is not None:
            self.bar(step, self.steps, self.text)

    def said(self, line: dict[str, Any]) -> None:
        step, now = line["step"], time.monotonic()
        if "loss" not in line:
            self.note(
                f"step {step}: held-out loss {line['held_out_raw']:.4f}, of the average {line['held_out_ema']:.4f}"
            )
            return
        self.text = f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s"
        if self.bar is None and (now - self.told >= SILENCE or step == self.steps):
            self.told = now
            left = (now - self.began) / max(1, step - (self.first or 0)) * (self.steps - step)
            self.note(f"step {step} of {self.steps}: {self.text}, {time_text(left)} left")
