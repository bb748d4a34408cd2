"""Names: of solvers and grids, of the same things in other tools, and what is nearest to a name that is not known.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from functools import cache

from . import solvers as _solvers  # noqa: F401  (registers them)
from .grids import GRIDS
from .solver import SOLVERS, Solver


class UnknownName(ValueError):
    """A scheduler, grid or option that does not exist; the message says what is near and what there is."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}: {hint}")


def names() -> list[str]:
    """Canonical names of the solvers."""
    return sorted(SOLVERS)


def grid_names() -> list[str]:
    return sorted(GRIDS)


def info(name: str) -> Solver:
    """What there is to know of a solver, by any of its names. Raises UnknownName."""
    return SOLVERS[resolve(name)[0]]


def resolve(label: str) -> tuple[str, str | None]:
    """(solver, grid or None) that a label means here: "DPM++ 2M Karras" is ("dpmpp_2m", "karras"). Raises UnknownName."""
    table = _labels()
    plain = _plain(label)
    if plain in table:
        return table[plain], None
    for grid in GRIDS:
        if plain.endswith(_plain(grid)) and plain.removesuffix(_plain(grid)) in table:
            return table[plain.removesuffix(_plain(grid))], grid
    raise UnknownName("scheduler", label, names())


def check_grid(name: str) -> str:
    """The name itself. Raises UnknownName."""
    if name not in GRIDS:
        raise UnknownName("grid", name, grid_names())
    return name


@cache
def _labels() -> dict[str, str]:
    table: dict[str, str] = {}
    for s in SOLVERS.values():
        for label in {_plain(s.name), _plain(s.a1111), *map(_plain, s.aliases)}:
            if label in table:
                raise ValueError(f"the name {label!r} is taken twice, by {table[label]} and {s.name}")
            table[label] = s.name
    return table


def _plain(label: str) -> str:
    """ "DPM++ 2M", "dpmpp_2m" and "dpm++2m" are one label."""
    return re.sub(r"[\s_\-]", "", label.lower().replace("++", "pp"))
