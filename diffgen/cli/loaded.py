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
    """Load a model as `diffgen.load` does. Inside `keeping`, return the last one if its arguments are the same."""
    arguments = (model, device, dtype, offload, quantize)
    if _kept is None:
        return _load(*arguments)
    if not _kept or _kept[0][0] != arguments:
        _kept.clear()  # before the next model takes memory
        _kept.append((arguments, _load(*arguments)))
    return _kept[0][1]


def _load(*arguments: Any) -> Generator:
    """Call `diffgen.load` with the garbage collector off, then exclude the objects that exist from collection.

    Imports create a million objects; collecting among them takes a sixth of the start-up time.
    """
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
