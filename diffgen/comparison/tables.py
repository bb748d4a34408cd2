"""The results of a comparison as CSV and as text tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from diffgen.training.metrics import METRICS

from .metrics import COMPARED, PICTURE, Interval
from .results import CellResult, DistributionResult, Results, RowResult, Scale, to_json

COLUMNS = (
    "scheduler", "label", "grid", "budget", "nfe", "steps", "seed", "prompt", "guidance", "stochastic", "seconds",
    "seconds_per_nfe", "network_calls", "peak_memory", *COMPARED, "image", "status", "reason",
)  # fmt: skip


class OnGrid(Protocol):
    """A scheduler on a grid: an entry, a cell, a row."""

    @property
    def label(self) -> str: ...
    @property
    def grid(self) -> str: ...


def numbered(count: int, name: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{count} {name}{'s' * (count != 1)}"


def name_of(entry: OnGrid) -> str:
    """ "euler on karras"."""
    return f"{entry.label} on {entry.grid}"


def number_text(value: float | None) -> str:
    """A number with three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def with_interval(value: Interval | None) -> str:
    """A mean with half of its interval, which has two digits; the mean ends at the same place: 296 ± 110."""
    if value is None:
        return "–"
    half = None if value.high is None else value.high - value.mean
    if not half or not (math.isfinite(value.mean) and math.isfinite(half)):
        return number_text(value.mean) + ("" if half is None else f" ± {half:.2g}")
    places = 1 - math.floor(math.log10(float(f"{half:.1e}")))
    if abs(value.mean) >= 1e7 or places > 8:
        return f"{value.mean:.3g} ± {half:.2g}"
    digits = max(0, places)
    return f"{round(value.mean, max(0, digits)):.{digits}f} ± {round(half, places):.{digits}f}"


def floor_text(scale: Scale) -> str:
    """The value for real pictures, with its standard deviation over several draws, where there is one."""
    return number_text(scale.floor) + ("" if scale.deviation is None else f" ± {scale.deviation:.2g}")


def as_csv(cells: Sequence[CellResult]) -> str:
    """The cells, one a line. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        content = to_json(cell)
        texts = {k: f"'{v}" for k, v in content.items() if isinstance(v, str) and v[:1] in tuple("=+-@\t\r")}
        writer.writerow(content | texts)
    return file.getvalue()


def as_table(results: Results) -> Iterator[list[str]]:
    """The rows for a terminal; the best of each budget is marked with a star."""
    names = ["sliced_wasserstein"] if results.model.is_mixture else list(PICTURE)
    yield ["scheduler", "grid", "NFE", "error", "rank", "s", *(METRICS[name].heading for name in names), ""]
    for row in sorted(results.rows, key=lambda r: (r.prompt, r.guidance, r.budget, _error_or_last(r))):
        notes = ["stochastic"] if row.stochastic else []
        notes += ["the reference itself"] if row.is_reference else []
        notes += [f"{count} {kind}" for count, kind in ((row.failed, "failed"), (row.missing, "missing")) if count]
        yield [
            row.label,
            row.grid,
            str(row.nfe if row.nfe is not None else f"≤ {row.budget}"),
            with_interval(row.error),
            "" if row.rank is None else f"{row.rank}{'*' if row.rank == 1 else ''}",
            *(
                number_text(None if value is None else value.mean)
                for value in (row.seconds, *(row.metrics.get(name) for name in names))
            ),
            ", ".join(notes),
        ]


def _mean(value: Interval | None) -> str:
    return number_text(None if value is None else value.mean)


def _error_or_last(row: RowResult) -> float:
    return math.inf if row.error is None else row.error.mean


def distribution_table(distribution: DistributionResult) -> Iterator[list[str]]:
    """The rows of a distribution for a terminal, and last the values for real pictures."""
    names = list(distribution.better)
    yield ["scheduler", "grid", "NFE", *names]
    for row in distribution.rows:
        figures = [number_text((row.values or {}).get(name)) for name in names]
        yield [row.label, row.grid, str(row.nfe), *figures, *([row.reason] if row.reason else [])]
    yield ["real pictures", "", "", *(floor_text(distribution.scales[name]) for name in names)]
