"""Rank settings whose errors the reference can separate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .metrics import Interval


def _by_setting(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, str, float], list[dict[str, Any]]]:
    """Rows that may be compared with each other."""
    groups: dict[tuple[int, str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["budget"], row["prompt"], row["guidance"]].append(row)
    return groups


def _judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that can be ranked, the nearest first: of all seeds, since a mean over those that went well flatters."""
    whole = (
        r for r in rows if r["error"] is not None and not r["failed"] and not r["missing"] and not r["is_reference"]
    )
    return sorted(whole, key=lambda r: r["error"]["mean"])


BELOW = 3  # times its own error are what a reference tells apart


def _rank(rows: list[dict[str, Any]], floor: float) -> None:
    """1 is nearest to the reference. A row whose interval overlaps that of the best of a rank shares it, and so does
    one whose error is, like that one's, below what the reference can tell; of one seed there is no rank."""
    judged = _judged(rows)
    if any(r["error"]["n"] < 2 for r in judged):
        return
    for i, row in enumerate(judged):
        first = next((r for r in judged[:i] if r["rank"] == judged[i - 1]["rank"]), None)  # of those that share a rank
        tied = first is not None and (
            row["error"]["mean"] < BELOW * floor or Interval(**row["error"]).overlaps(Interval(**first["error"]))
        )
        row["rank"] = first["rank"] if tied and first else i + 1
