"""diffgen: pictures from prompts, a native DDPM, and schedulers that are compared with what is exactly known.

    import diffgen
    pictures = diffgen.load("emoji").generate("a red apple", seed=7)   # a list of PIL images, metadata in `.info`

Importing this package imports no torch; `load` does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.find import Model
    from .stable_diffusion.generate import ImageGenerator
    from .training.generate import RunGenerator

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    name: str | os.PathLike[str] | Model | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    quantize: str = "none",
) -> ImageGenerator | RunGenerator:
    """A model, checked and loaded: what `models.find.find` finds, also a run; None is `emoji`. `generate` calls it.

    `device` is auto, cpu, cuda, cuda:N, mps or xpu; `dtype` is auto, float32, float16 or bfloat16.
    `offload` (model or sequential) keeps its parts in main memory while a GPU does not need them.
    `quantize` int8 keeps the weights of its linear layers in eight bits.
    Raises, from `diffgen.errors`, InputError for a model that is unknown, refused or broken, UsageError for a device or
    dtype that does not exist, OutOfMemory.
    """
    from . import environment
    from .devices import device_name, dtype_name
    from .errors import UsageError
    from .models.find import Model, find

    model = name if isinstance(name, Model) else find(name if name is None else os.fspath(name))
    device, dtype = device_name(device), dtype_name(dtype)
    environment.prepare()
    if model.family == "run":
        if offload != "none":
            raise UsageError(f"--offload {offload} is not there for a run of `diffgen train`", "leave it out")
        if quantize != "none":
            raise UsageError(f"--quantize {quantize} is not there for a run of `diffgen train`", "leave it out")
        from .training.generate import RunGenerator

        return RunGenerator(model, device=device, dtype=dtype)
    from .stable_diffusion.generate import ImageGenerator

    return ImageGenerator(model, device=device, dtype=dtype, offload=offload, quantize=quantize)
