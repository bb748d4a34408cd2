"""A data set in memory: images as one uint8 tensor, with classes and captions."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int, int], None]


Captions = tuple[tuple[str, float], ...]  # of one picture: (text, weight), the weights not yet brought to a sum of 1


@dataclass(frozen=True)
class DataSet:
    """Pictures with what is known of them."""

    name: str  # a base name
    images: Tensor  # uint8 [N, C, H, W], on the CPU; possibly mapped from a file
    labels: Tensor | None  # LongTensor [N], numbers of classes
    classes: list[str] | None
    captions: list[Captions] | None
    levels: int  # the values are 0 … levels − 1
    digests: Tensor = field(repr=False)  # int64 [N], a hash of each picture's values
    notes: tuple[str, ...] = ()  # what was done to the pictures, and what was left out
    held_out: Tensor | None = None  # bool [N], where the data says itself what is held out

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.images.shape[2], self.images.shape[3]

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of all that training depends on, in its order: values, classes, captions, what is held out."""
        captions = self.captions
        if captions is not None and all(said == ((said[0][0], 1.0),) for said in captions):
            captions = [said[0][0] for said in captions]  # type: ignore[misc]
        about = [list(self.images.shape), self.levels, self.classes, captions]
        if self.held_out is not None:
            about.append(self.held_out.nonzero().flatten().tolist())
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update(self.digests.numpy().astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """What a run says of its data."""
        return {
            "name": self.name,
            "channels": self.channels,
            "size": list(self.size),
            "classes": self.classes,
            "levels": self.levels,
            "count": len(self),
            "fingerprint": self.fingerprint,
        }

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(train, test): LongTensors of picture numbers, ascending; `test` has the fraction `held_out` of each class.

        By a hash of (seed, the picture's values): the same wherever the data lies, and equal pictures of a class stay
        together. Of two pictures or more, at least one is held out unless `held_out` is 0. Where the data says
        itself what is held out, that counts instead.
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
        held = set(test)
        train = [i for i in range(len(self)) if i not in held]
        return torch.tensor(train, dtype=torch.int64), torch.tensor(sorted(test), dtype=torch.int64)

    def to_float(self, values: Tensor) -> Tensor:
        """Values 0 … levels − 1 to float32 in [-1, 1]: 2·x/(levels − 1) − 1, on the device where they are."""
        return values.float() / ((self.levels - 1) / 2) - 1

    def to_values(self, x: Tensor) -> Tensor:
        """The nearest values, uint8, of floats in [-1, 1]; what lies outside is clipped."""
        return ((x.float() + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).to(torch.uint8)


def _digests(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """int64 [N]: the first eight bytes of each picture's SHA-256."""
    hashes = [hashlib.sha256(picture.tobytes()).digest()[:8] for picture in pictures]
    return np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64)
