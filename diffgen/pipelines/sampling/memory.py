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

from diffgen.devices import main_memory
from diffgen.errors import InputError, UsageError
from diffgen.generation.needs import ACTIVATIONS, widest

from ..plan import Plan

MOST = (8, 16)  # pictures at once on a CPU, on an accelerator: larger batches are hardly faster
HINT = "try a smaller --size; on a GPU also --dtype float16, --offload model, --offload sequential"


def check_offload(name: str, device: torch.device) -> str:
    """Check the name of an offload mode: it needs a GPU and, except for `group`, accelerate.

    Raises UsageError, InputError.
    """
    if name != "none":
        if device.type == "cpu":
            raise UsageError(f"--offload {name} saves a GPU's memory, but the device is the CPU", "leave it out")
        if name != "group" and importlib.util.find_spec("accelerate") is None:
            raise InputError(f"--offload {name} needs the package accelerate", "pip install 'diffgen[offload]'")
    return name


def offload(pipeline: Any, kind: str, device: torch.device) -> None:
    """Keep the pipeline's parts in main memory and on the device only while they compute.

    `model` moves whole networks, `sequential` layer by layer, `group` too, the next layers while one computes.
    """
    if kind == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif kind == "group":
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type in ("cuda", "xpu"))
    elif kind == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)


def fitting(pipeline: Any, plan: Plan, device: torch.device, dtype: torch.dtype, guided: bool) -> int:
    """How many pictures to make at once: those whose activations fill half of the free memory, within reason.

    The network's activations are estimated by its widest layer at the full resolution. Where the estimate is too high,
    the batch is smaller than it could be; if it is too low, running out of memory makes the batch smaller.
    """
    network = pipeline.components[plan.checked.row.denoiser]
    scale = getattr(pipeline, "vae_scale_factor", 1)
    positions = plan.final_size[0] * plan.final_size[1] // scale**2
    width, positions = widest(plan.checked.row, network.config, positions)
    one = ACTIVATIONS * positions * width * dtype.itemsize * (1 + guided)
    return max(1, min(MOST[device.type != "cpu"], free_memory(device) // 2 // one))


def free_memory(device: torch.device) -> int:
    """The bytes of memory that new tensors on the device can take."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return main_memory()


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
