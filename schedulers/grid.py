"""A grid: the points at which the network is evaluated, from the noisiest to the clean picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from schedulers.noise import NoiseSchedule, Point


class Grid:
    """N + 1 points from the noisiest down to σ = 0. `grid[i]` is a point, `grid[i:]` the rest of the grid.

    `total` is the number of steps of the whole grid. A part of it, as image-to-image uses, has fewer steps and the same
    evaluations as the whole run has from there on. `corrections` are those of a tuned grid, a row for each step of the
    whole grid; see `solver.corrected`.
    """

    def __init__(
        self,
        points: Sequence[Point],
        noise: NoiseSchedule,
        total: int | None = None,
        corrections: Sequence[Sequence[Any]] = (),
    ) -> None:
        self.points, self.noise, self.corrections = list(points), noise, corrections
        self.total = len(self.points) - 1 if total is None else total

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: Any) -> Any:
        return (
            Grid(self.points[i], self.noise, self.total, self.corrections) if isinstance(i, slice) else self.points[i]
        )

    def pairs(self) -> Iterator[tuple[Point, Point]]:
        """(from, to) of each step."""
        yield from zip(self.points[:-1], self.points[1:], strict=True)

    def at(self, *, t: Any = None, lam: Any = None) -> Point:
        """A point between those of the grid, such as a solver's midpoint."""
        return self.noise.at(t=t, lam=lam)


Points = Callable[[NoiseSchedule, int], Sequence[Point]]  # the n points of a grid, without the clean picture


def fractions(n: int) -> list[float]:
    """n numbers from 0 to 1."""
    return [k / (n - 1) if n > 1 else 0.0 for k in range(n)]


def between(noise: NoiseSchedule, level: float, top: Point, bottom: Point) -> Point:
    """The point at that noise level, or the end that it equals up to rounding, so that it never leaves the schedule."""
    if level >= noise.level(top) * (1 - 1e-12):
        return top
    if level <= noise.level(bottom) * (1 + 1e-12):
        return bottom
    return noise.at(level=level)
