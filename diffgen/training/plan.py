"""Plan the pictures of a run: check every number and name, and fill in defaults, without torch."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Unpack

import schedulers
from diffgen.errors import InputError, UsageError
from diffgen.generation import grid_files, plan
from diffgen.generation.checks import (
    DEFAULTS,
    check_batch_size,
    check_guidance,
    check_int,
    check_sampling,
    parse_size,
    which_seeds,
)
from diffgen.generation.options import Options, flag_of, unsupported, with_our_names
from diffgen.models.find import Model

from . import config as configuration
from .job import JOBS
from .run import Run, read_run

MAX_SIDE = 1024
AT_ONCE = 2**16  # pixels of a batch, unless its size is set


@dataclass(frozen=True, kw_only=True)
class Shot(plan.Shot):
    """One picture of a run. Its prompt is the name of its class, "" without classes."""

    plan: RunPlan = field(compare=False, repr=False)
    label: int | None


@dataclass(frozen=True, kw_only=True)
class RunPlan(plan.Plan):
    """A checked request for pictures of a run. Prompts are names of classes; "" is a class drawn from the seed."""

    OWN: ClassVar[frozenset[str]] = plan.Plan.OWN | {"run"}

    run: Run

    @property
    def fitting(self) -> int:
        """How many pictures make a good batch: more would not be faster on a CPU."""
        return max(1, min(256, AT_ONCE // (self.width * self.height)))

    def shots(self) -> Iterator[Shot]:
        """Every picture: prompts first, then seeds."""
        classes = self.run.data["classes"]
        for prompt in self.prompts:
            for index in range(self.count):
                seed = self.seed_of(index)
                if classes is None:
                    yield Shot(plan=self, prompt="", label=None, index=index, seed=seed)
                else:
                    label = classes.index(prompt) if prompt else drawn_class(seed, len(classes))
                    yield Shot(plan=self, prompt=classes[label], label=label, index=index, seed=seed)


def drawn_class(seed: int, classes: int) -> int:
    """A class drawn from the seed, uniformly."""
    return int.from_bytes(hashlib.sha256(f"class of {seed}".encode()).digest()[:8], "big") % classes


def make_plan(model: Model, prompts: str | Sequence[str] = (), **keywords: Unpack[Options]) -> RunPlan:
    """Check everything that can be checked without torch.

    The run has a default for each option. Options that only pipelines take are refused unless they are neutral.
    Raises UsageError for a wrong number or name, InputError for a wrong run.
    """
    options = with_our_names(keywords)
    if name := unsupported(options, "run"):
        raise UsageError(f"{flag_of(name)} is not supported for a run of `diffgen train`", "leave it out")
    chosen = {key: options[key] for key in ("steps", "guidance", "scheduler", "grid") if options.get(key) is not None}
    check_sampling(DEFAULTS | chosen, native=True)  # before the run, so that a wrong option is not blamed on it
    size = None if options.get("size") is None else parse_size(options["size"])
    which = which_seeds(options.get("count", 1), options.get("seed"), options.get("seeds"))
    batch_size = check_batch_size(options.get("batch_size", 1))

    run = read_run(model.folder)
    config = _config(run)
    guides = run.data["classes"] is not None and config.diffusion.label_dropout > 0
    own = {
        "steps": config.sample.steps,
        "guidance": config.sample.guidance if guides else 1.0,
        "scheduler": config.sample.scheduler,
        "grid": None,
    }
    try:
        check_sampling(own, native=True)
    except UsageError as error:
        raise InputError(f"{run.folder / 'run.json'}: {error.message}") from error
    sampling = check_sampling(own | chosen, native=True, noise=noise_and_prediction(model)[0])
    if sampling["guidance"] != 1 and not guides:
        why = "without classes" if run.data["classes"] is None else "with label_dropout = 0"
        raise UsageError(f"--guidance {sampling['guidance']:g}: {run.name} was trained {why}", "leave it out")
    height, width = run.data["size"]
    notes = [*grid_files.grid_notes(sampling), *check_guidance(sampling, "" if guides else "was trained without it")]
    if size is not None and size != (width, height):
        check_int("--size: the longer side", max(size), 1, MAX_SIDE)
        notes.append(f"{run.name} was trained at {width}x{height}: other sizes may not look like its data")
    return RunPlan(
        model=model,
        run=run,
        prompts=_classes(run, [prompts] if isinstance(prompts, str) else list(prompts)),
        width=size[0] if size else width,
        height=size[1] if size else height,
        batch_size=batch_size,
        notes=tuple(notes),
        keep_steps=options.get("keep_steps", False),
        given=frozenset(key for key, value in options.items() if value is not None),
        **which,
        **sampling,
    )


def noise_and_prediction(model: Model) -> tuple[schedulers.NoiseSchedule, str]:
    """The noise schedule and the prediction that a run was trained with. Raises InputError."""
    run = read_run(model.folder)
    try:
        return schedulers.NoiseSchedule.named(run.noise["name"], T=run.noise["T"]), run.prediction
    except (KeyError, ValueError) as error:
        raise InputError(f"{run.folder / 'run.json'}: {error}") from error


def _config(run: Run) -> configuration.Config:
    kind = JOBS.get(run.job)
    if kind is None or kind.hint:
        hint = (
            kind.hint.format(run=run.folder, base=run.base.get("name", "MODEL"))
            if kind
            else 'pictures are made by runs of the job "pixels"'
        )
        raise InputError(f"{run.folder} is a run of the job {run.job!r}", hint)
    if not run.checkpoints():
        hint = f"train it first: diffgen train {run.data['name']} -o {run.folder} --resume"
        raise InputError(f"{run.folder} has no checkpoint yet", hint)
    return configuration.parse(run.config, run.folder / "run.json")


def _classes(run: Run, prompts: list[str]) -> tuple[str, ...]:
    """The names of classes that the prompts are; ("",) if there are none. Raises UsageError."""
    classes = run.data["classes"]
    if not prompts:
        return ("",)
    if classes is None:
        raise UsageError(f"{run.name} reads no prompts: it was trained without classes", "leave the prompt out")
    folded = {name.casefold(): name for name in reversed(classes)}
    names = []
    for prompt in prompts:
        name = prompt if prompt in classes else folded.get(prompt.strip().casefold())
        if not name:
            near = difflib.get_close_matches(prompt.strip().casefold(), folded, n=1, cutoff=0.5)
            guess = f"did you mean {folded[near[0]]!r}? " if near else ""
            listed = ", ".join(classes[:30]) + (f" and {len(classes) - 30} more" if len(classes) > 30 else "")
            raise UsageError(f"{run.name} has no class {prompt!r}", f"{guess}there are {listed}")
        names.append(name)
    return tuple(names)
