"""Devices and dtypes: their names, checked without torch, and what they stand for, which imports it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from diffgen.errors import OutOfMemory, UsageError

if TYPE_CHECKING:
    import torch


def device_name(name: str) -> str:
    """The name of a device, if it can be one. Whether it is there, torch knows. Raises UsageError."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", name):
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N, mps or xpu (got {name!r})")
    return name


def dtype_name(name: str) -> str:
    """The full name of a dtype. Raises UsageError."""
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    if name not in ("auto", "float32", "float16", "bfloat16"):
        raise UsageError(f"--dtype must be auto, float32, float16 or bfloat16 (got {name!r})")
    return name


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else Apple's GPU, else the CPU. Raises UsageError if it is not there."""
    import torch

    present: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if present[kind]())
    device = torch.device(name)
    count = getattr(torch, device.type).device_count() if present[device.type]() else 0
    if (device.index or 0) >= count:
        raise UsageError(f"--device {name}: torch finds no such device on this machine", "try --device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` is float32 on a CPU, float16 elsewhere."""
    import torch

    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn what torch raises where memory ends into OutOfMemory."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        raise OutOfMemory(
            f"out of memory: {text.splitlines()[0] if text else 'no more to be had'}",
            "try a smaller --size, --batch-size 1, or --dtype float16 on a GPU",
        ) from error
