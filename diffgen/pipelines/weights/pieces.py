"""The primitives of layouts: what a tensor of a file becomes in a network, under which name.

A layout says of every name in a file which tensors of the network come from it: under another name, one of several
parts of its rows (the original layouts keep queries, keys and values in one matrix), transposed, with its halves
exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Take = Callable[[Tensor], Tensor]
Pieces = list[tuple[str, Take]]  # [(name in the network, what it takes of the file's tensor)]
Layout = Callable[[str], Pieces]  # of a name in the file; empty for what belongs to another part or is not needed
Rename = Callable[[str, Any], Pieces | None]  # of a name without its prefix and the configuration; None: not in it


def keep(x: Tensor) -> Tensor:
    return x


def rows(part: int, parts: int, x: Tensor) -> Tensor:
    """One of several equal parts."""
    return x.chunk(parts)[part]


def row_range(begin: int, end: int | None, x: Tensor) -> Tensor:
    return x[begin:end]


def exchanged(x: Tensor) -> Tensor:
    """(shift, scale), as the original networks have it, to (scale, shift)."""
    return torch.cat(x.chunk(2)[::-1])


def transposed(x: Tensor) -> Tensor:
    return x.mT


def linear(x: Tensor) -> Tensor:
    """The matrix of a convolution over one pixel."""
    return x.flatten(1) if x.ndim > 2 and x[0, 0].numel() == 1 else x


ROWWISE = (keep, rows, row_range, exchanged)  # each row of the result is a whole row of the argument


def thirds(*names: str) -> Pieces:
    """Three equal parts of the rows: queries, keys and values."""
    return [(name, functools.partial(rows, i, 3)) for i, name in enumerate(names)]


def replaced(table: Mapping[str, str], name: str) -> str | None:
    """The name with its beginning replaced by the table: it ends with .weight or .bias. None: not in the table."""
    stem, _, end = name.rpartition(".")
    return f"{table[stem]}.{end}" if stem in table else None
