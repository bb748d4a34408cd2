"""The precision and the attention in which a device is fast."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffgen.devices import has_amx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Pixels of an example above which a CPU is faster in bfloat16: twice as fast at 32 × 32, not at all at 8 × 8.
WORTH_IT = 16 * 16


def fast_dtype(name: str, device: torch.device, area: int) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 if the hardware is fast in it, else float32.

    `area` is the number of pixels of an example. The choice does not depend on how many processes there are.
    """
    if name == "auto":
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amx = device.type == "cpu" and has_amx() and area >= WORTH_IT
        name = "bfloat16" if cuda or amx else "float32"
    return DTYPES[name]


def fast_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The attention for bfloat16: on a CPU plain products, which are faster than the fused one; else torch's choice."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
