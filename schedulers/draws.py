"""Random numbers for a batch of pictures, from one generator for each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for each picture, one for all, or PyTorch's own


def normal(shape: Sequence[int], generators: Generators, device: Any = "cpu") -> Tensor:
    """Draw standard normal noise, float32 [B, …]; picture i draws from generator i, on that generator's device.

    Raises ValueError unless there are as many generators as pictures.
    """
    if isinstance(generators, Sequence):
        if len(generators) != shape[0]:
            raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}: one for each image is needed")
        return torch.cat([normal([1, *shape[1:]], g, device) for g in generators])
    where = device if generators is None else generators.device
    return torch.randn(list(shape), generator=generators, device=where, dtype=torch.float32).to(device)
