"""A comparison's results as CSV and as text tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any


def numbered(count: int, name: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{count} {name}{'s' * (count != 1)}"


def of_mixture(results: dict[str, Any]) -> bool:
    """Whether results are the mixture's, whose metrics compare distributions."""
    return bool(results["model"]["family"] == "mixture")


def name_of(row: dict[str, Any]) -> str:
    return f"{row['label']} on {row['grid']}"


def shown(value: dict[str, Any] | None) -> str:
    """A mean with half its interval."""
    if value is None:
        return "–"
    half = "" if value["high"] is None else f" ± {value['high'] - value['mean']:.2g}"
    return f"{value['mean']:.3g}{half}"


COLUMNS = (
    "scheduler", "label", "grid", "budget", "nfe", "steps", "seed", "prompt", "guidance", "stochastic", "seconds",
    "seconds_per_nfe", "network_calls", "peak_memory", "error", "psnr", "ssim", "mean_error", "covariance_error",
    "sliced_wasserstein", "image", "status", "reason",
)  # fmt: skip


def as_csv(found: dict[str, Any]) -> str:
    """The cells, one a line. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for cell in found["cells"]:
        texts = {k: f"'{v}" for k, v in cell.items() if isinstance(v, str) and v[:1] in tuple("=+-@\t\r")}
        writer.writerow(cell | texts)
    return file.getvalue()


def as_table(found: dict[str, Any]) -> Iterator[list[str]]:
    """The rows for a terminal; the best of each budget is marked with a star."""
    mixture = of_mixture(found)
    yield ["scheduler", "grid", "NFE", "error", "rank", "s", *(["sliced W"] if mixture else ["PSNR", "SSIM"]), ""]
    for row in sorted(found["rows"], key=lambda r: (r["prompt"], r["guidance"], r["budget"], _last(r))):
        notes = ["stochastic"] if row["stochastic"] else []
        notes += ["the reference itself"] if row["is_reference"] else []
        notes += [f"{row[kind]} {kind}" for kind in ("failed", "missing") if row[kind]]
        rank = "" if row["rank"] is None else f"{row['rank']}{'*' if row['rank'] == 1 else ''}"
        other = ["sliced_wasserstein"] if mixture else ["psnr", "ssim"]
        yield [
            row["label"],
            row["grid"],
            str(row["nfe"] if row["nfe"] is not None else f"≤ {row['budget']}"),
            shown(row["error"]),
            rank,
            "–" if row["seconds"] is None else f"{row['seconds']['mean']:.3g}",
            *("–" if row[n] is None else f"{row[n]['mean']:.3g}" for n in other),
            ", ".join(notes),
        ]


def _last(row: dict[str, Any]) -> float:
    return math.inf if row["error"] is None else row["error"]["mean"]


def distribution_table(found: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of `distribution` for a terminal, and what real pictures reach."""
    said = found["distribution"]
    names = list(said["better"])
    yield ["scheduler", "grid", "NFE", *names]
    for row in said["rows"]:
        values = row["values"] or {}
        figures = [_figure(values.get(name)) for name in names]
        yield [row["label"], row["grid"], str(row["nfe"]), *figures, *([row["reason"]] if row["reason"] else [])]
    yield ["real pictures", "", "", *(floor_text(said["scales"][name]) for name in names)]


def floor_text(scale: dict[str, Any]) -> str:
    """What real pictures reach, with the standard deviation over the draws of them, where there is one."""
    return _figure(scale["floor"]) + ("" if scale.get("deviation") is None else f" ± {scale['deviation']:.2g}")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
