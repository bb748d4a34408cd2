"""From finished cells to results: errors, summaries with intervals, measured orders, what may be said in words."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from PIL import Image

import schedulers
from diffgen.training.metrics import sliced_wasserstein
from schedulers.record import Program

from . import metrics
from .metrics import Interval, interval
from .plan import Cell, Entry
from .run import Comparison, versions
from .subjects import MixtureSubject

SCHEMA = "diffgen.compare/1"
Row = tuple[Entry, int, str, float]  # what a summary is about: a scheduler at a budget, for a prompt and a guidance


def results(
    comparison: Comparison, command: str, seconds: float | None = None, distribution: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The whole of results.json; `distribution` is what distribution.py found, for a run with data."""
    subject = comparison.subject
    cells = [_cell(comparison, i, cell) for i, cell in enumerate(comparison.cells)]
    references = [r for start in comparison.axes.starts() if (r := _reference(comparison, *start)) is not None]
    _judge(comparison, cells, references)
    known = [r["error"] for r in references if r["error"] is not None]
    floor = max(known) if known else 0.0  # how well the reference itself is known
    rows = _rows(comparison, cells, {r["key"] for r in references}, floor)
    found = {
        "schema": SCHEMA,
        "command": command,
        "seconds": seconds,
        "model": {
            "name": subject.name,
            "family": subject.family,
            "hash": subject.model_hash,
            "noise": subject.noise.name,
            "prediction": subject.prediction,
            "device": subject.device.type,
            "dtype": str(subject.dtype).removeprefix("torch."),
        },
        "axes": comparison.axes.asdict(),
        "reference": {
            "kind": _kind(comparison),
            "name": None if comparison.reference is None else _reference_name(comparison),
            "error": floor if known else None,
            "reason": comparison.reference_failure,
            "starts": references,
        },
        "cells": cells,
        "rows": rows,
        "orders": _orders(comparison, rows, floor),
        "grids": _grids(comparison),
        "duplicates": _duplicates(comparison, cells),
        "distribution": distribution,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return found | {"verdict": [*verdict(found), *(f"{n[0].upper()}{n[1:]}." for n in comparison.notes())]}


def _kind(comparison: Comparison) -> str:
    if comparison.reference is None:
        return "none"
    return "exact" if comparison.reference.entry is None else "numerical"


def _reference_name(comparison: Comparison) -> str:
    reference = comparison.reference
    assert reference is not None
    if reference.entry is None:
        return "exact solution"
    return f"{reference.entry.label} on {reference.entry.grid_name}, {reference.nfe} evaluations"


def _cell(comparison: Comparison, i: int, cell: Cell) -> dict[str, Any]:
    key = comparison.key(cell)
    record = comparison.folder.record(key) if key else None
    failure = comparison.failures.get(i)
    done = record is not None and failure is None
    seconds, nfe = (record["seconds"], record["nfe"]) if done and record else (None, cell.nfe)
    return {
        "scheduler": cell.entry.scheduler,
        "label": cell.entry.label,
        "grid": cell.entry.grid_name,
        "budget": cell.budget,
        "nfe": nfe,
        "steps": cell.steps,
        "seed": cell.seed,
        "prompt": cell.prompt,
        "guidance": cell.guidance,
        "stochastic": cell.entry.stochastic,
        "seconds": seconds,
        "seconds_per_nfe": seconds / nfe if seconds is not None and nfe else None,
        "network_calls": record.get("network_calls") if done and record else None,
        "peak_memory": record.get("peak_memory") if done and record else None,
        "error": None,
        "psnr": None,
        "ssim": None,
        "image": record["image"] if done and record else None,
        "pixels_sha256": record["pixels_sha256"] if done and record else None,
        "noise_sha256": record["noise_sha256"] if done and record else None,
        "status": "done" if done else "failed" if failure else "missing",
        "reason": failure,
        "key": key,
    }


def _reference(comparison: Comparison, seed: int, prompt: str, guidance: float) -> dict[str, Any] | None:
    """The reference of a start; its own error is that of half the evaluations, divided by 2^order − 1."""
    jobs = comparison.reference_jobs(seed, prompt, guidance)
    records = [comparison.folder.record(job.key) for job in jobs]
    if not jobs or records[0] is None:
        return None
    error = 0.0 if len(jobs) == 1 else None
    if len(jobs) == 2 and records[1] is not None:
        entry = comparison.reference.entry if comparison.reference else None
        assert entry is not None
        whole, half = (comparison.folder.result(job.key).numpy() for job in jobs)
        order = min(schedulers.info(entry.scheduler).order, 2)  # of guided networks no more can be hoped for
        error = metrics.rms(whole, half) / (2**order - 1)
    said: dict[str, Any] = {"seed": seed, "prompt": prompt, "guidance": guidance, "key": jobs[0].key, "error": error}
    said |= {"nfe": records[0]["nfe"], "image": records[0]["image"]}
    if isinstance(comparison.subject, MixtureSubject):  # how near so small a cloud can come
        said |= _moments(comparison.subject, comparison.folder.result(jobs[0].key), seed)
    return said


def _judge(comparison: Comparison, cells: list[dict[str, Any]], references: list[dict[str, Any]]) -> None:
    """Fill in the errors. A stochastic solver has none: no single solution is what it aims at."""
    by_start = {(r["seed"], r["prompt"], r["guidance"]): r for r in references}
    solutions: dict[str, Any] = {}  # of the start that was looked at last: its cells follow each other
    for cell in cells:
        reference = by_start.get((cell["seed"], cell["prompt"], cell["guidance"]))
        if cell["status"] != "done":
            continue
        x0 = comparison.folder.result(cell["key"])
        if isinstance(comparison.subject, MixtureSubject):
            cell |= _moments(comparison.subject, x0, cell["seed"])
        if reference is None or cell["stochastic"]:
            continue
        pictures = comparison.subject.family != "mixture"  # whose picture is a plot
        if reference["key"] not in solutions:
            image = _picture(comparison, reference["image"]) if pictures else None
            solutions = {reference["key"]: (comparison.folder.result(reference["key"]).numpy(), image)}
        aim, image = solutions[reference["key"]]
        cell["error"] = metrics.rms(x0.numpy(), aim)
        if image is not None:
            made = _picture(comparison, cell["image"])
            cell["psnr"], cell["ssim"] = metrics.psnr(made, image), metrics.ssim(made, image)


def _moments(subject: MixtureSubject, x0: torch.Tensor, seed: int) -> dict[str, float]:
    """How far mean, covariance and distribution of a cloud are from those of the data, known exactly."""
    mean, covariance = subject.moments
    return {
        "mean_error": float((x0.double().mean(0) - mean).norm()),
        "covariance_error": float((torch.cov(x0.double().T) - covariance).norm()),
        "sliced_wasserstein": float(sliced_wasserstein(x0, subject.draw(4 * len(x0), seed + 1))),
    }


def _picture(comparison: Comparison, name: str) -> Image.Image:
    with Image.open(comparison.folder.path / name) as image:
        return image.convert("RGB")


def _rows(
    comparison: Comparison, cells: list[dict[str, Any]], references: set[str], floor: float
) -> list[dict[str, Any]]:
    """Each scheduler at each budget: means over the seeds with their intervals, and a rank where there can be one.

    A row that is the reference itself (its cells have the keys of `references`) has none.
    """
    groups: dict[Row, list[dict[str, Any]]] = defaultdict(list)
    for cell, said in zip(comparison.cells, cells, strict=True):
        groups[cell.entry, cell.budget, cell.prompt, cell.guidance].append(said)
    rows = []
    for (entry, budget, prompt, guidance), members in groups.items():
        done = [m for m in members if m["status"] == "done"]
        row = {
            "scheduler": entry.scheduler,
            "label": entry.label,
            "grid": entry.grid_name,
            "stochastic": entry.stochastic,
            "budget": budget,
            "prompt": prompt,
            "guidance": guidance,
            "nfe": members[0]["nfe"],
            "steps": members[0]["steps"],
            "done": len(done),
            "failed": sum(m["status"] == "failed" for m in members),
            "missing": sum(m["status"] == "missing" for m in members),
            "is_reference": any(m["key"] in references for m in members),
            "rank": None,
        }
        row |= {name: _summary(done, name) for name in ("error", "psnr", "ssim", "seconds", "seconds_per_nfe")}
        if comparison.subject.family == "mixture":
            row |= {n: _summary(done, n) for n in ("mean_error", "covariance_error", "sliced_wasserstein")}
        rows.append(row)
    for group in _by_setting(rows).values():
        _rank(group, floor)
    return rows


def _summary(cells: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    values = [cell[name] for cell in cells if cell.get(name) is not None and math.isfinite(cell[name])]
    return vars(interval(values)) if values else None


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


def _orders(comparison: Comparison, rows: list[dict[str, Any]], floor: float) -> list[dict[str, Any]]:
    """The measured order of each solver, over budgets whose error stands well above that of the reference."""
    groups: dict[tuple[str, str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["error"] is not None and row["error"]["mean"] > max(BELOW * floor, 1e-12):
            groups[row["label"], row["grid"], row["prompt"], row["guidance"]].append(row)
    found = []
    for (label, grid, prompt, guidance), members in groups.items():
        nfe = [m["nfe"] for m in members]
        order = metrics.order(nfe, [m["error"]["mean"] for m in members]) if len(set(nfe)) >= 3 else None
        said = {"label": label, "grid": grid, "prompt": prompt, "guidance": guidance, "order": order}
        found.append(said | {"from": min(nfe), "to": max(nfe)})
    return found


def _grids(comparison: Comparison) -> list[dict[str, Any]]:
    """Where each scheduler asks, for the largest budget that it can use: times and σ/α (of a flow σ)."""
    flow = comparison.subject.noise.name == "flow"
    found = {}
    for cell in comparison.cells:
        if cell.steps is not None:
            points = comparison.scheduler(cell.entry).grid(cell.steps).points[:-1]
            found[cell.entry] = {
                "label": cell.entry.label,
                "grid": cell.entry.grid_name,
                "budget": cell.budget,
                "times": [float(p.t) for p in points],
                "sigmas": [float(p.sigma if flow or p.alpha == 0 else p.rho) for p in points],
            }
    return list(found.values())


def _duplicates(comparison: Comparison, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Different cells of one start with the same pixels, and whether the arithmetic is the same, so that they must."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell["status"] == "done":
            groups[cell["pixels_sha256"], cell["seed"], cell["prompt"], cell["guidance"]].append(i)
    found: dict[tuple[Entry, Entry, int, int], dict[str, Any]] = {}
    for members in groups.values():
        for i, j in itertools.combinations(members, 2):
            a, b = comparison.cells[i], comparison.cells[j]
            pair = (a.entry, b.entry, a.budget, b.budget)
            if pair in found:
                found[pair]["cells"].append([i, j])
                continue
            same = _same_arithmetic(comparison, a, b)
            why = "the same steps with the same coefficients" if same else "different arithmetic: worth a look"
            found[pair] = {"cells": [[i, j]], "expected": same, "why": why}
    return list(found.values())


def _same_arithmetic(comparison: Comparison, a: Cell, b: Cell) -> bool:
    """Do two cells ask at the same points and add up the answers with the same weights?"""
    if a.steps is None or b.steps is None:
        return False
    if comparison.key(a) == comparison.key(b):
        return True
    programs = []
    for cell in (a, b):
        scheduler = comparison.scheduler(cell.entry)
        grid = scheduler.grid(cell.steps)

        def steps(x: Any, noise: Any, scheduler: Any = scheduler, grid: Any = grid) -> Any:
            return scheduler._function(x, grid, noise)

        try:
            programs.append(Program(steps, scheduler._pair))
        except (TypeError, AttributeError):
            return False
    one, other = programs
    if len(one.points) != len(other.points):
        return False
    near = all(math.isclose(p.t, q.t, abs_tol=1e-9) for p, q in zip(one.points, other.points, strict=True))
    weights = [[dict(update) for update in program.updates] for program in programs]
    return near and all(
        math.isclose(u.get(k, 0.0), v.get(k, 0.0), rel_tol=1e-6, abs_tol=1e-7)
        for u, v in zip(*weights, strict=True)
        for k in u.keys() | v.keys()
    )


# In words


def verdict(found: dict[str, Any]) -> list[str]:
    """What the figures allow to be said, a sentence for each budget and setting; and what they do not."""
    sentences = []
    if found["reference"]["kind"] == "none":
        sentences.append("There is no reference, so nothing is ranked: compare the pictures and the seconds.")
    several = len(found["axes"]["prompts"]) > 1 or len(found["axes"]["guidance"]) > 1
    for (budget, prompt, guidance), rows in _by_setting(found["rows"]).items():
        where = f" ({prompt!r}, guidance {guidance:g})" if several else ""
        judged = _judged(rows)
        if not judged:
            continue
        best, n = judged[0], judged[0]["error"]["n"]
        at = f"At {numbered(budget, 'evaluation')}{where}"
        if n < 2:
            sentences.append(
                f"{at} {name_of(best)} came nearest to the reference ({best['error']['mean']:.3g}), but one seed ranks "
                "nothing: use several."
            )
            continue
        tied = [r for r in judged[1:] if r["rank"] == 1]
        if tied and len(tied) == len(judged) - 1:
            sentences.append(
                f"{at} {n} seeds tell none of the {len(judged)} schedulers apart: the mean of {name_of(best)} is the "
                f"least, {shown(best['error'])}, and the others' cannot be told from it."
            )
            continue
        text = f"{at} {name_of(best)} is nearest to the reference: {shown(best['error'])}"
        if tied:
            text += f"; not told apart from it: {', '.join(name_of(r) for r in tied[:4])}"
            text += f" and {len(tied) - 4} more" if len(tied) > 4 else ""
        sentences.append(text + ".")
    floor, near = found["reference"]["error"], [r for r in found["rows"] if r["error"] is not None]
    if floor and any(r["error"]["mean"] < BELOW * floor for r in near):
        sentences.append(
            f"Errors below {BELOW * floor:.2g} are not told apart: the reference itself is known to about {floor:.2g} "
            "only."
        )
    if own := sorted({f"{name_of(r)} at {r['budget']}" for r in found["rows"] if r["is_reference"]}):
        sentences.append(f"No rank for the reference itself: {', '.join(own)}.")
    if reasons := _unmeasured(found):
        sentences.append(f"The pictures of {len(reasons)} schedulers could not be measured: {reasons[0]}.")
    if stochastic := sorted({r["label"] for r in found["rows"] if r["stochastic"]}):
        verb = "draws" if len(stochastic) == 1 else "draw"
        sentences.append(
            f"{', '.join(stochastic)} {verb} noise on the way: no distance to a solution has a meaning, so there is no "
            "rank."
        )
    if failed := [c for c in found["cells"] if c["status"] == "failed"]:
        sentences.append(
            f"{len(failed)} of {len(found['cells'])} cells failed: {failed[0]['reason']}. Where one of a scheduler's "
            "seeds failed, it has no rank."
        )
    if missing := sum(c["status"] == "missing" for c in found["cells"]):
        sentences.append(
            f"{missing} of {len(found['cells'])} cells are not made yet; a scheduler without some of them has no rank."
        )
    if reason := found["reference"].get("reason"):
        sentences.append(f"A reference could not be made: {reason}.")
    if odd := [d for d in found["duplicates"] if not d["expected"]]:
        i, j = odd[0]["cells"][0]
        a, b = found["cells"][i], found["cells"][j]
        sentences.append(
            f"{name_of(a)} at {a['budget']} and {name_of(b)} at {b['budget']} gave the same pixels by different "
            "arithmetic: the pictures have converged, or an option has no effect."
        )
    return sentences


def missing(found: dict[str, Any]) -> str | None:
    """Of what results.json has, what was asked for and could not be made, the first of it; None if all is there."""
    failed = [cell for cell in found["cells"] if cell["status"] == "failed"]
    if failed:
        reasons = sorted({cell["reason"] for cell in failed if cell["reason"]})
        return f"{len(failed)} of {len(found['cells'])} cells failed: {'; '.join(reasons)[:500]}"
    if reasons := _unmeasured(found):
        of = numbered(len(reasons), "setting")
        return f"the pictures of {of} could not be measured: {'; '.join(sorted(set(reasons)))}"[:500]
    if reason := found["reference"]["reason"]:
        return f"a reference could not be made: {reason}"
    return None


def _unmeasured(found: dict[str, Any]) -> list[str]:
    """Why schedulers' pictures could not be measured against the data, one reason for each."""
    return [row["reason"] for row in (found["distribution"] or {"rows": ()})["rows"] if row["reason"]]


def numbered(count: int, name: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{count} {name}{'s' * (count != 1)}"


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
    mixture = found["model"]["family"] == "mixture"
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
