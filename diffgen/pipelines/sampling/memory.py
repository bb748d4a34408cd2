"""What is done to fit into memory and into the range of half precision, and a list of what was done.

The autoencoder is where both end first: it works on all the pixels, and its activations outgrow float16. So one
picture at a time goes through it; where memory ends, in tiles; where numbers end, once more in float32.
"""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffgen.errors import InputError, UsageError

HINT = "try a smaller --size; on a GPU also --dtype float16, --offload model, --offload sequential"


def check_offload(name: str, device: torch.device) -> str:
    """The name, if it can be done: on a GPU, by the package accelerate. Raises UsageError, InputError."""
    if name != "none":
        if device.type == "cpu":
            raise UsageError(f"--offload {name} spares a GPU's memory, and the device is the CPU", "leave it out")
        if importlib.util.find_spec("accelerate") is None:
            raise InputError(f"--offload {name} needs the package accelerate", "pip install 'diffgen[offload]'")
    return name


def offload(pipeline: Any, kind: str, device: torch.device) -> None:
    """Keep the pipeline's parts in main memory and on the device only while they compute.

    `model` moves whole networks, `sequential` layer by layer.
    """
    if kind == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif kind == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)


def release() -> None:
    """Give back what is no longer used, so that a smaller attempt finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_flagged(safety: tuple[Any, Any], image: Image.Image, device: torch.device, dtype: torch.dtype) -> bool:
    """What the model's safety checker says of a picture; `safety` is (checker, its image processor)."""
    checker, processor = safety
    seen = processor(images=[image], return_tensors="pt").pixel_values.to(device=device, dtype=dtype)
    _, flags = checker(images=np.asarray(image)[None] / 255, clip_input=seen)
    return bool(flags[0])
