"""The model that stays loaded between the lines of `diffgen shell`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import diffgen

_kept: list[tuple[tuple[Any, ...], Any]] | None = None  # at most one; None outside a shell


def load(*asked: Any) -> Any:
    """`diffgen.load(*asked)`; inside `keeping`, what was loaded last if the same was asked for."""
    if _kept is None:
        return diffgen.load(*asked)
    if not _kept or _kept[0][0] != asked:
        _kept.clear()  # before the next one takes memory
        _kept.append((asked, diffgen.load(*asked)))
    return _kept[0][1]


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Inside, the last model that was loaded stays so."""
    global _kept
    _kept = []
    try:
        yield
    finally:
        _kept = None
