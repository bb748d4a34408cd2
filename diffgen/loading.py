"""Load any model and plan its pictures: the one place that chooses between a pipeline and a run of `diffgen train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

if TYPE_CHECKING:
    from schedulers import NoiseSchedule

    from .generation.options import Options
    from .generation.plan import Plan
    from .models.find import Model
    from .pipelines.generate import ImageGenerator
    from .training.generate import RunGenerator


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
    offload   model or sequential keeps the parts in main memory while a GPU does not need them
    quantize  int8 keeps the weights of linear layers in eight bits

    Raises, from `diffgen.errors`: InputError for a model that is unknown, refused or broken, UsageError for a device or
    dtype that does not exist, OutOfMemory.
    """
    from . import environment
    from .devices import device_name, dtype_name
    from .errors import UsageError
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
    """Check all that a request for pictures says, without torch; the model has a default for what is left out.

    Raises UsageError for a wrong number, name or combination, InputError for a wrong model or input file.
    """
    if model.is_run:
        from .training.plan import make_plan as plan_run

        return plan_run(model, prompts, **options)
    from .pipelines.plan import make_plan as plan_pipeline

    return plan_pipeline(model, prompts, **options)


def noise_and_prediction(model: Model) -> tuple[NoiseSchedule, str]:
    """The noise schedule and the prediction that a model was trained with. Raises InputError."""
    if model.is_run:
        from .training.plan import noise_and_prediction as of_run

        return of_run(model)
    from .models.find import check
    from .pipelines.plan import noise_and_prediction as of_pipeline

    return of_pipeline(check(model))
