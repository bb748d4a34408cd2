"""Fit into memory: offloading, releasing memory, and the safety checker.

The autoencoder needs the most memory, since it works on all the pixels, and its activations may overflow in float16.
So it takes one picture at a time, in tiles if memory runs out, in float32 if it overflows: see autoencoder.py.
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
    """Check the name of an offload mode: it needs a GPU and the package accelerate. Raises UsageError, InputError."""
    if name != "none":
        if device.type == "cpu":
            raise UsageError(f"--offload {name} saves a GPU's memory, but the device is the CPU", "leave it out")
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
    """Free unused memory before a smaller attempt."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_flagged(safety: tuple[Any, Any], image: Image.Image, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the model's safety checker flags a picture; `safety` is (checker, its image processor)."""
    checker, processor = safety
    pixels = processor(images=[image], return_tensors="pt").pixel_values.to(device=device, dtype=dtype)
    _, flags = checker(images=np.asarray(image)[None] / 255, clip_input=pixels)
    return bool(flags[0])
