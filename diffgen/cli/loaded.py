"""The model that stays loaded between the lines of `diffgen shell`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import diffgen

if TYPE_CHECKING:
    from diffgen.generation.model import Generator
    from diffgen.models.find import Model

_kept: list[tuple[tuple[Model, str, str, str, str], Generator]] | None = None  # at most one; None outside a shell


def load(model: Model, device: str, dtype: str, offload: str, quantize: str) -> Generator:
    """`diffgen.load` with these arguments. Inside `keeping`, the last model if it was loaded with the same ones."""
    arguments = (model, device, dtype, offload, quantize)
    if _kept is None:
        return _load(*arguments)
    if not _kept or _kept[0][0] != arguments:
        _kept.clear()  # before the next model takes memory
        _kept.append((arguments, _load(*arguments)))
    return _kept[0][1]


def _load(*arguments: Any) -> Generator:
    """`diffgen.load` without garbage collection: imports make a million objects, and looking through them again and
    again takes a sixth of the start-up time. Afterwards they are set aside for good."""
    gc.disable()
    try:
        return diffgen.load(*arguments)
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Keep the last model loaded until the end of the block."""
    global _kept
    _kept = []
    try:
        yield
    finally:
        _kept = None
