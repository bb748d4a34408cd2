"""Training data that a function computes: picture i is `make(i)`, called when a step needs it.

    def stripe(i):                                          # uint8 [C, H, W], always the same for the same i
        rng = np.random.default_rng((0, i))
        ...
    data = ProceduralData(stripe, 1_000_000, name="stripes 1")
    diffgen.train(data, "runs/stripes", config="stripes.toml")

The function is an argument from Python; it is never looked up by a name in a file. It must be pure: then batch k of a
training is a function of (seed, k), and a resumed training ends in the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgen.errors import InputError

from .dataset import Captions, described

PROBES = 16  # pictures that are hashed for the fingerprint
MAX_COUNT = 2**31 - 1


class _Captions(Sequence[Captions]):
    """The captions of pictures 0 … count − 1."""

    def __init__(self, describe: Callable[[int], str | Captions], count: int) -> None:
        self._describe, self._count = describe, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._count))]
        if not 0 <= i < self._count:
            raise IndexError(f"picture {i} of {self._count}")
        text = self._describe(i)
        return ((text, 1.0),) if isinstance(text, str) else text


class ProceduralData:
    """Pictures that a function computes: `TrainingData`."""

    classes: list[str] | None = None
    labels: Tensor | None = None
    notes: tuple[str, ...] = ()
    levels = 256

    def __init__(
        self,
        make: Callable[[int], np.ndarray],
        count: int,
        *,
        name: str,
        held_out: int = 256,
        describe: Callable[[int], str | Captions] | None = None,
    ) -> None:
        """
        make      called with a number 0 … count − 1; returns uint8 [C, H, W] of one shape, with 1, 3 or 4 channels
        name      shown in runs; change it when the function changes: it is part of the fingerprint, with some pictures
        held_out  the number of pictures, at the end, that are never trained on
        describe  the caption of a picture, or its captions with their weights; pure as well

        Raises ValueError for an invalid count, InputError for an invalid picture.
        """
        if not 0 <= held_out < count <= MAX_COUNT:
            raise ValueError(f"count must lie in held_out + 1 … {MAX_COUNT} (got {count}, held_out {held_out})")
        self.name, self._make, self._count, self._held_out, self._describe = name, make, count, held_out, describe
        first = make(0)
        if not isinstance(first, np.ndarray) or first.ndim != 3 or first.shape[0] not in (1, 3, 4):
            raise InputError(f"{name}: picture 0 is not an array [C, H, W] with 1, 3 or 4 channels")
        self._shape = first.shape
        self._picture(0)

    def __len__(self) -> int:
        return self._count

    @property
    def channels(self) -> int:
        return self._shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self._shape[1], self._shape[2]

    @property
    def captions(self) -> Sequence[Captions] | None:
        """The captions of each picture, computed when they are read."""
        return None if self._describe is None else _Captions(self._describe, self._count)

    def pictures(self, indices: Tensor) -> Tensor:
        """The values of these pictures, uint8 [b, C, H, W], on the CPU. Raises IndexError, InputError."""
        values = torch.empty(len(indices), *self._shape, dtype=torch.uint8)
        for row, i in enumerate(indices.tolist()):
            values[row] = torch.from_numpy(self._picture(i))
        return values

    def _picture(self, i: int) -> np.ndarray:
        if not 0 <= i < self._count:
            raise IndexError(f"picture {i} of {self._count}")
        picture = self._make(i)
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != self._shape:
            kind = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
            raise InputError(f"{self.name}: picture {i} is {kind}, not uint8 {self._shape}")
        return picture

    def to_float(self, values: Tensor) -> Tensor:
        """Convert values 0 … 255 to float32 in [-1, 1], on the same device."""
        return values.float() / 127.5 - 1

    def on(self, device: torch.device) -> ProceduralData:
        """The same data: they are computed on the CPU."""
        return self

    def split(self, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
        """(train, test): LongTensors of picture numbers; `test` has the last ones, as many as the constructor says."""
        cut = self._count - self._held_out
        return torch.arange(cut), torch.arange(cut, self._count)

    def about(self) -> dict[str, Any]:
        """The description of the data for run.json. Its fingerprint hashes the name, the numbers and a few pictures."""
        digest = hashlib.sha256(self.name.encode() + struct.pack("<qq", self._count, self._held_out))
        for i in np.linspace(0, self._count - 1, min(self._count, PROBES)).astype(int).tolist():
            digest.update(self._picture(i).tobytes())
            if self._describe is not None:
                digest.update(repr(self._describe(i)).encode())
        return described(self, digest.hexdigest())
