"""Rank the rows of a setting by their error; rows that seeds or the reference cannot separate share a rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from .results import Place, RowResult

BELOW = 3  # a reference separates errors from this many times its own error on


def by_setting(rows: Sequence[RowResult]) -> dict[tuple[int, str, float], list[RowResult]]:
    """The rows that can be compared with each other, by budget, prompt and guidance scale."""
    groups: dict[tuple[int, str, float], list[RowResult]] = defaultdict(list)
    for row in rows:
        groups[row.budget, row.prompt, row.guidance].append(row)
    return groups


def rankable(rows: Sequence[RowResult]) -> list[RowResult]:
    """The rows that can be ranked, the nearest first. Rows that lack a seed cannot: their mean would flatter."""
    complete = [r for r in rows if r.error is not None and not r.failed and not r.missing and not r.is_reference]
    return sorted(complete, key=error_of_row)


def error_of_row(row: RowResult) -> float:
    """The mean error of a row that has one."""
    assert row.error is not None
    return row.error.mean


def ranked(rows: Sequence[RowResult], floor: float) -> tuple[RowResult, ...]:
    """The rows with their ranks, each setting by itself; `floor` is the error of the reference itself."""
    ranks: dict[Place, int] = {}
    for group in by_setting(rows).values():
        ranks |= _ranks(rankable(group), floor)
    return tuple(replace(row, rank=ranks.get(row.place)) for row in rows)


def _ranks(rows: Sequence[RowResult], floor: float) -> dict[Place, int]:
    """Ranks from 1, the nearest. A row shares the rank before it if its interval overlaps that of the best with that
    rank, or if the reference cannot separate their errors. One seed gives no ranks."""
    ranks: dict[Place, int] = {}
    best: RowResult | None = None  # of the rows that share a rank
    for i, row in enumerate(rows):
        assert row.error is not None
        if row.error.n < 2:
            return {}
        if best is None or not (row.error.mean < BELOW * floor or (best.error and row.error.overlaps(best.error))):
            best = row
            ranks[row.place] = i + 1
        else:
            ranks[row.place] = ranks[best.place]
    return ranks
