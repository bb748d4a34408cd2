"""What a training job needs of its data, and a data set in memory: one uint8 tensor with classes and captions."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int, int], None]  # called with (done, total)


Captions = tuple[tuple[str, float], ...]  # of one picture: (text, weight); the weights need not sum to 1


class TrainingData(Protocol):
    """What a training job needs of its data: N numbered pictures of one size, which never change.

    `DataSet` has them in memory. Others may compute them, for instance from (seed, number).
    """

    @property
    def name(self) -> str:
        """A base name."""
        ...

    @property
    def channels(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        ...

    @property
    def levels(self) -> int:
        """The number of values of a pixel: they are 0 … levels − 1."""
        ...

    @property
    def classes(self) -> list[str] | None: ...

    @property
    def labels(self) -> Tensor | None:
        """LongTensor [N], numbers of classes."""
        ...

    @property
    def captions(self) -> Sequence[Captions] | None:
        """The captions of each picture."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What was changed or left out, for the user."""
        ...

    def __len__(self) -> int: ...

    def pictures(self, indices: Tensor) -> Tensor:
        """The values of these pictures, uint8 [b, C, H, W]; `indices` is a LongTensor [b]."""
        ...

    def to_float(self, values: Tensor) -> Tensor:
        """The values as float32 in [-1, 1], on the same device."""
        ...

    def on(self, device: torch.device) -> TrainingData:
        """The same data, kept on the device if they fit there."""
        ...

    def split(self, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
        """(train, test): LongTensors of picture numbers, ascending, the same for every seed of a training."""
        ...

    def about(self) -> dict[str, Any]:
        """The description for run.json: JSON values, among them a `fingerprint` of everything that training reads."""
        ...


def described(data: TrainingData, fingerprint: str) -> dict[str, Any]:
    """The description of data for run.json, whatever they are read from."""
    return {
        "name": data.name,
        "channels": data.channels,
        "size": list(data.size),
        "classes": data.classes,
        "levels": data.levels,
        "count": len(data),
        "fingerprint": fingerprint,
    }


@dataclass(frozen=True)
class DataSet:
    """Pictures in memory, with their classes and captions: `TrainingData`."""

    name: str  # a base name
    images: Tensor  # uint8 [N, C, H, W]; possibly mapped from a file
    labels: Tensor | None  # LongTensor [N], numbers of classes
    classes: list[str] | None
    captions: list[Captions] | None
    levels: int  # the values are 0 … levels − 1
    digests: Tensor = field(repr=False)  # int64 [N], a hash of each picture's values
    notes: tuple[str, ...] = ()  # what was done to the pictures, and what was left out
    held_out: Tensor | None = None  # bool [N], if the data name the held-out pictures

    def __len__(self) -> int:
        return self.images.shape[0]

    def pictures(self, indices: Tensor) -> Tensor:
        """The values of these pictures, uint8 [b, C, H, W], on the device of `images`."""
        return self.images[indices.to(self.images.device)]

    def on(self, device: torch.device) -> DataSet:
        """The same data, with `images` on the device if they fit there."""
        return replace(self, images=self.images.to(device)) if _fits(self.images, device) else self

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.images.shape[2], self.images.shape[3]

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of everything that training reads: values, classes, captions, the held-out pictures."""
        captions: Sequence[Any] | None = self.captions
        if captions is not None and all(each == ((each[0][0], 1.0),) for each in captions):
            captions = [each[0][0] for each in captions]  # one caption without a weight each
        about = [list(self.images.shape), self.levels, self.classes, captions]
        if self.held_out is not None:
            about.append(self.held_out.nonzero().flatten().tolist())
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update(self.digests.numpy().astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """The description of the data for run.json."""
        return described(self, self.fingerprint)

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(train, test): LongTensors of picture numbers, ascending; `test` has the fraction `held_out` of each class.

        The choice is by a hash of (seed, the picture's values): it is the same on every machine, and equal pictures of
        a class stay together. Of two pictures or more, at least one is held out unless `held_out` is 0. If the data
        name the held-out pictures, those are taken instead.
        Raises ValueError for a fraction outside [0, 1).
        """
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
        if self.held_out is not None:
            return (~self.held_out).nonzero().flatten(), self.held_out.nonzero().flatten()
        keys = [hashlib.sha256(struct.pack("<qq", seed, d)).digest() for d in self.digests.tolist()]
        labels = [0] * len(self) if self.labels is None else self.labels.tolist()
        groups: dict[int, list[int]] = {}
        for i in sorted(range(len(self)), key=lambda i: (keys[i], i)):
            groups.setdefault(labels[i], []).append(i)
        test = []
        for _, group in sorted(groups.items()):
            cut = round(held_out * len(group))
            while 0 < cut < len(group) - 1 and keys[group[cut]] == keys[group[cut - 1]]:
                cut += 1
            test += group[:cut]
        if not test and held_out > 0 and len(self) > 1:
            test = [min(range(len(self)), key=lambda i: keys[i])]
        excluded = set(test)
        train = [i for i in range(len(self)) if i not in excluded]
        return torch.tensor(train, dtype=torch.int64), torch.tensor(sorted(test), dtype=torch.int64)

    def to_float(self, values: Tensor) -> Tensor:
        """Convert values 0 … levels − 1 to float32 in [-1, 1]: 2·x/(levels − 1) − 1, on the same device."""
        return values.float() / ((self.levels - 1) / 2) - 1

    def to_values(self, x: Tensor) -> Tensor:
        """Convert floats in [-1, 1] to the nearest values, uint8; floats outside the range are clipped."""
        return ((x.float() + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).to(torch.uint8)


def digests_of(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """int64 [N]: the first eight bytes of each picture's SHA-256."""
    hashes = [hashlib.sha256(picture.tobytes()).digest()[:8] for picture in pictures]
    return np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64)


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether to keep the images on the device: on a GPU, if they take at most half of its free memory."""
    if device.type != "cuda":
        return device.type != "cpu"
    return images.numel() <= torch.cuda.mem_get_info(device)[0] // 2
