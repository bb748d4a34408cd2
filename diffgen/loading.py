"""Load any model: a diffusion pipeline or a run of `diffgen train`. The one place that chooses between the two."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
