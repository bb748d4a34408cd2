"""Load any model and plan its pictures: the one place that chooses between a pipeline and a run of `diffgen train`."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

from .errors import DiffgenError, UsageError, checked_arguments

if TYPE_CHECKING:
    from schedulers import NoiseSchedule

    from .generation.options import Options
    from .generation.plan import Plan
    from .models.find import Model
    from .pipelines.generate import ImageGenerator
    from .prompts.files import Line
    from .training.generate import RunGenerator


@checked_arguments()
def load(
    name: str | os.PathLike[str] | Model | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    quantize: str = "none",
) -> ImageGenerator | RunGenerator:
    """Load a model after checking its files: any that `models.find.find` finds, runs too. None is `emoji`.

    device    auto, cpu, cuda, cuda:N, mps or xpu
    dtype     auto, float32, float16 or bfloat16
    offload   model, group or sequential keeps the parts in main memory while a GPU does not need them
    quantize  int8, fp8, nf4 or fp8-storage keeps the weights of linear layers in eight or four bits

    Raises, from `diffgen.errors`: InputError for a model that is unknown, refused or broken, UsageError for a device,
    dtype or keyword that does not exist, OutOfMemory.
    """
    from . import environment
    from .devices import device_name, dtype_name
    from .models.find import Model, find

    model = name if isinstance(name, Model) else find(name if name is None else os.fspath(name))
    device, dtype = device_name(device), dtype_name(dtype)
    environment.prepare()
    if model.is_run:
        for option, value in (("offload", offload), ("quantize", quantize)):
            if value != "none":
                raise UsageError(f"--{option} {value} is not supported for a run of `diffgen train`", "leave it out")
        from .training.generate import RunGenerator

        return RunGenerator(model, device=device, dtype=dtype)
    from .pipelines.generate import ImageGenerator

    return ImageGenerator(model, device=device, dtype=dtype, offload=offload, quantize=quantize)


def make_plan(model: Model, prompts: str | Sequence[str] = (), **options: Unpack[Options]) -> Plan:
    """Check a request for pictures, without torch. The model has a default for each option.

    Raises UsageError for a wrong number, name or combination, InputError for a wrong model or input file.
    """
    if model.is_run:
        from .training.plan import make_plan as plan_run

        return plan_run(model, prompts, **options)
    from .pipelines.plan import make_plan as plan_pipeline

    return plan_pipeline(model, prompts, **options)


def read_prompts(prompts: Sequence[str], file: str | None = None) -> list[Line]:
    """The prompts, "-" replaced by the lines of stdin, then the lines of a file. Raises InputError, UsageError."""
    from .generation.options import json_types
    from .prompts.files import Line, read_lines

    types = json_types()
    lines = [line for text in prompts for line in (read_lines("-", types) if text == "-" else [Line(text)])]
    return lines + (read_lines(file, types) if file is not None else [])


def count_pictures(lines: Sequence[Line], options: Options) -> int:
    """How many pictures the lines and the options for all of them ask for. Raises UsageError."""
    from .generation.checks import MAX_PICTURES, check_int, which_seeds

    total = 0
    for line in lines:
        values = {**options, **line.options}
        with _naming(line.where if line.options else ""):
            total += which_seeds(values.get("count", 1), values.get("seed"), values.get("seeds"))["count"]
    check_int("the number of pictures", total, 0, MAX_PICTURES)
    return total if lines else which_seeds(options.get("count", 1), options.get("seed"), options.get("seeds"))["count"]


def make_plans(model: Model, lines: Sequence[Line], options: Options) -> list[Plan]:
    """A plan for each group of neighbouring lines with the same options; one without a prompt if there are no lines.

    A line's own options replace those for all. A random seed is drawn once for all lines. Raises what `make_plan` does,
    with the place of the line.
    """
    from .pipelines.plan import check_text
    from .prompts.wildcards import Wildcards

    wildcards = Wildcards(options.get("wildcards"))
    for line in lines if not model.is_run else ():
        with _naming(line.where):
            check_text(line.prompt, {**options, **line.options}.get("prompt_syntax", "a1111"), wildcards)
    if not lines:
        return [make_plan(model, (), **options)]
    plans: list[Plan] = []
    for own, group in itertools.groupby(lines, lambda line: line.options):
        texts = list(group)
        with _naming(texts[0].where if own else ""):
            plans.append(make_plan(model, [line.prompt for line in texts], **{**options, **own}))
        if not {"seed", "seeds"} & {*options, *own}:  # the random one: the seed of a line is its own
            options = {**options, "seed": plans[-1].seed}
    return plans


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Put the place of a line, if it has one, before an error of the block."""
    try:
        yield
    except DiffgenError as error:
        error.message = f"{place}: {error.message}" if place else error.message
        raise


def noise_and_prediction(model: Model) -> tuple[NoiseSchedule, str]:
    """The noise schedule and the prediction that a model was trained with. Raises InputError."""
    if model.is_run:
        from .training.plan import noise_and_prediction as of_run

        return of_run(model)
    from .models.find import check
    from .pipelines.plan import noise_and_prediction as of_pipeline

    return of_pipeline(check(model))
