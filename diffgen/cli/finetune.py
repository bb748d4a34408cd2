"""diffgen finetune: change a model by a few pictures."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

import diffgen

from .options import Device, Wait, option
from .output import Debug, Json, Quiet
from .train import (
    DATA,
    RUN,
    TRAINING,
    BatchSize,
    CheckpointEvery,
    Compiled,
    Config,
    DryRun,
    Init,
    Out,
    Parallel,
    Resume,
    Seed,
    Steps,
    run_training,
)

EXAMPLES = """
Examples:

  diffgen finetune emoji my-rex/ -o runs/rex --trigger "<rex>"

  diffgen generate "a <rex> in the snow" --lora runs/rex

  diffgen finetune sdxl/ my-style/ -o runs/style --rank 32 --steps 2000 --dry-run
"""


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Any model that `generate -m` takes, except a run.")],
    data: Annotated[
        str,
        typer.Argument(metavar="PICTURES", help="A folder; captions are in a.txt beside a.png, or in metadata.jsonl."),
    ],
    out: Out,
    job: Annotated[str | None, option(RUN, "What to train. \\[lora]", metavar="lora|embedding|full|control")] = None,
    trigger: Annotated[str | None, option(RUN, "A word put in front of captions that lack it.", metavar="WORD")] = None,
    config: Config = None,
    resume: Resume = False,
    init: Init = None,
    checkpoint_every: CheckpointEvery = None,
    dry_run: DryRun = False,
    rank: Annotated[int | None, option(TRAINING, "The rank of the adapter. \\[16]")] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: Annotated[float | None, option(TRAINING, "Learning rate. \\[by job and model]", metavar="X")] = None,
    seed: Seed = None,
    size: Annotated[
        int | None,
        option(DATA, "The side of the square that pictures have as many pixels as. \\[the model's]", metavar="N"),
    ] = None,
    flip: Annotated[bool | None, option(DATA, "Mirror half of the pictures.", "--flip/--no-flip")] = None,
    device: Device = "auto",
    compiled: Compiled = None,
    parallel: Parallel = None,
    wait: Wait = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    options: dict[str, Any] = {
        "job": job,
        "trigger": trigger,
        "rank": rank,
        "learning_rate": learning_rate,
        "size": size,
        "flip": flip,
        "config": config,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "compile": compiled,
        "parallel": parallel,
        "resume": resume,
        "init": init,
        "device": device,
        "wait": wait,
        "dry_run": dry_run,
    }
    start = partial(diffgen.finetune, model, data, out, **options)
    run_training("finetune", start, out, dry_run, json, quiet, debug)
