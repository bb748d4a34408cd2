"""Results kept in the user's cache folder by the content that they were computed from.

A key is everything that a result depends on, so that an entry is either right or not there: it can never change one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffgen.errors import CannotWrite
from diffgen.images.publish import publish

VERSION = 1  # of the code that computes the results: raise it where that changes them
Tensors = dict[str, Tensor]


class Content:
    """A folder of results of one kind: `content(key, make)` reads one, or makes and keeps it."""

    def __init__(self, kind: str, on: bool, *depends: object) -> None:
        """`depends` is what all results depend on: hashes of weights, a dtype. With `on` false nothing is kept."""
        self.on, self.depends = on, (VERSION, kind, *depends)
        self.folder = user_cache_path("diffgen") / kind

    def path(self, key: object) -> Path:
        digest = hashlib.sha256(repr((self.depends, key)).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:40]}.safetensors"

    def __call__(self, key: object, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of a key. A cache that cannot be written is not an error: nothing is kept then."""
        if not self.on:
            return make()
        path = self.path(key)
        with contextlib.suppress(OSError, SafetensorError):
            return load_file(path)
        tensors = make()
        with contextlib.suppress(OSError, CannotWrite):
            path.parent.mkdir(parents=True, exist_ok=True)
            cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            publish(path, save(cpu), overwrite=True)
        return tensors
