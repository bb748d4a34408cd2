"""Devices and dtypes: check their names without torch, then choose the objects with it."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffgen.errors import OutOfMemory, UsageError

if TYPE_CHECKING:
    import torch


GIGABYTE = 2**30
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
LARGE = 100_000_000  # parameters from which a network is twice as fast in bfloat16 on a CPU with AMX

# Messages of libraries under torch when memory ends: its allocator, oneDNN, C++, cuDNN and cuBLAS.
OUT_OF_MEMORY = ("allocate memory", "could not create a primitive", "bad_alloc", "ALLOC_FAILED")


def device_name(name: str) -> str:
    """Check the name of a device, but not whether it exists. Raises UsageError."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", name):
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N, mps or xpu (got {name!r})")
    return name


def dtype_name(name: str) -> str:
    """The full name of a dtype. Raises UsageError."""
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    if name not in ("auto", "float32", "float16", "bfloat16"):
        raise UsageError(f"--dtype must be auto, float32, float16 or bfloat16 (got {name!r})")
    return name


def main_memory() -> int:
    """The bytes of main memory that are free, within the limit of a container."""
    free = [GIGABYTE]  # where nothing is known
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = [int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024]
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(free))


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else Apple's GPU, else the CPU. Raises UsageError if it is missing."""
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


def choose_dtype(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """The dtype of that name for a network with so many parameters.

    `auto` is bfloat16 where the device multiplies it fast. Otherwise it is float16 on an accelerator and float32 on a
    CPU, and always float32 on a CPU for small networks, which are hardly faster in bfloat16.
    """
    import torch

    if name == "auto":
        on_cpu = device.type == "cpu"
        worth_it = not on_cpu or parameters >= LARGE
        name = "bfloat16" if worth_it and fast_bfloat16(device) else "float32" if on_cpu else "float16"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 much faster than float32.

    Intel's AMX and NVIDIA's Ampere and later do. Other processors that have instructions for it are tried.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (has_amx() or (_has_bfloat16() and product_speedup() > 1.5))


def has_amx() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (Intel's AMX)."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def product_speedup(size: int = 512) -> float:
    """How many times faster the CPU multiplies two square matrices in bfloat16 than in float32, on one try."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def describe() -> dict[str, object]:
    """Describe the default device: device, name, memory in bytes (of an accelerator), bf16 (is bfloat16 fast?)."""
    import torch

    device = choose_device("auto")
    bf16 = fast_bfloat16(device)
    if device.type != "cuda":
        return {"device": device.type, "name": None, "memory": None, "bf16": bf16}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": device.type,
        "name": properties.name,
        "memory": properties.total_memory,
        "bf16": bf16,
    }


def _has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; detected on Linux only."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return re.search(r"\b(avx512_bf16|avx_bf16|bf16)\b", file.read(2**20)) is not None
    return False


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """Raise OutOfMemory for the errors that torch raises when memory ends."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        by_type = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not by_type and not any(sign in text for sign in OUT_OF_MEMORY):
            raise
        raise OutOfMemory(
            f"out of memory: {text.splitlines()[0] if text else 'no memory left'}",
            "try a smaller --size, --batch-size 1, or --dtype float16 on a GPU",
        ) from error
