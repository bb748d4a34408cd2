"""Data that a function makes: example i is `make(i)`, computed when a step asks for it.

    def disk(i):                                            # uint8 [C, H, W], the same whenever it is asked for
        rng = np.random.default_rng((0, i))
        ...
    data = procedural(disk, 1_000_000, name="disks 1")
    job = AutoencoderJob(config, data)                      # or PixelJob: they train on it as on a folder

The function is given from Python and is never found by a name in a file. It must be pure: batch k of a training then is
a function of (seed, k), so a run that is interrupted ends in the same bytes as one that is not.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffgen.errors import InputError

from .dataset import DataSet

Make = Callable[[int], np.ndarray]
PROBES = 16  # examples that the fingerprint reads
MAX_COUNT = 2**31 - 1


class ComputedImages:
    """Pictures by number, made when they are read: the part of a Tensor's interface that jobs read pictures by."""

    dtype, device = torch.uint8, torch.device("cpu")

    def __init__(self, make: Make, shape: tuple[int, int, int, int]) -> None:
        self.make, self.shape = make, torch.Size(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, which: int | slice | Tensor) -> Tensor:
        """uint8 [C, H, W] of a number; [B, C, H, W] of a LongTensor [B] or a slice. Raises InputError, IndexError."""
        if isinstance(which, slice):
            which = torch.arange(len(self))[which]
        if isinstance(which, Tensor) and which.ndim:
            found = torch.empty(len(which), *self.shape[1:], dtype=self.dtype)
            for row, i in enumerate(which.tolist()):
                found[row] = torch.from_numpy(self._one(i))
            return found
        return torch.from_numpy(self._one(int(which)).copy())

    def _one(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        picture = self.make(i % len(self))
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != self.shape[1:]:
            kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
            raise InputError(f"example {i} is {kind}, not uint8 {tuple(self.shape[1:])}", "all examples have one shape")
        return picture


def procedural(make: Make, count: int, *, name: str, held_out: int = 256) -> DataSet:
    """A data set of `count` examples that are computed when they are read.

    make      number 0 … count − 1 to uint8 [C, H, W] with 1, 3 or 4 channels; pure, and of one shape
    name      what runs call it; change it when the function changes: it is part of the fingerprint, with a few examples
    held_out  the last so many examples are never trained on
    Raises ValueError for a count or a number of held-out examples that cannot be, InputError for a wrong example.
    """
    if not 0 <= held_out < count <= MAX_COUNT:
        raise ValueError(f"count must lie between held_out + 1 and {MAX_COUNT} (got {count}, held_out {held_out})")
    first = make(0)
    if not isinstance(first, np.ndarray) or first.ndim != 3 or first.shape[0] not in (1, 3, 4):
        raise InputError(f"{name}: example 0 is no array [C, H, W] with 1, 3 or 4 channels")
    images = ComputedImages(make, (count, first.shape[0], first.shape[1], first.shape[2]))
    probes = torch.linspace(0, count - 1, min(count, PROBES)).long()
    digest = hashlib.sha256(name.encode() + struct.pack("<qq", count, held_out))
    digest.update(images[probes].numpy().tobytes())
    out = torch.zeros(count, dtype=torch.bool)
    out[count - held_out :] = True
    digests = torch.from_numpy(np.frombuffer(digest.digest()[:8], dtype="<i8").astype(np.int64))
    return DataSet(name, images, None, None, None, 256, digests, held_out=out)  # type: ignore[arg-type]
