"""From finished cells to results: errors, summaries with intervals, measured orders, what may be said in words."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from PIL import Image

import schedulers
from diffgen.training.metrics import sliced_wasserstein

from . import metrics
from .metrics import interval
from .plan import Cell, Entry
from .ranks import BELOW, _by_setting, _rank
from .run import Comparison, versions
from .subjects import MixtureSubject
from .verdict import verdict

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
        pictures = not comparison.subject.is_mixture  # whose picture is a plot
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
        if comparison.subject.is_mixture:
            row |= {n: _summary(done, n) for n in ("mean_error", "covariance_error", "sliced_wasserstein")}
        rows.append(row)
    for group in _by_setting(rows).values():
        _rank(group, floor)
    return rows


def _summary(cells: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    values = [cell[name] for cell in cells if cell.get(name) is not None and math.isfinite(cell[name])]
    return vars(interval(values)) if values else None


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
    noise = comparison.subject.noise
    found = {}
    for cell in comparison.cells:
        if cell.steps is not None:
            points = comparison.scheduler(cell.entry).grid(cell.steps).points[:-1]
            found[cell.entry] = {
                "label": cell.entry.label,
                "grid": cell.entry.grid_name,
                "budget": cell.budget,
                "times": [float(p.t) for p in points],
                "sigmas": [float(p.sigma if p.alpha == 0 else noise.level(p)) for p in points],
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
    schedulers = [comparison.scheduler(cell.entry) for cell in (a, b)]
    one, other = (s.program(s.grid(cell.steps)) for s, cell in zip(schedulers, (a, b), strict=True))
    if one is None or other is None or len(one.points) != len(other.points):
        return False
    near = all(math.isclose(p.t, q.t, abs_tol=1e-9) for p, q in zip(one.points, other.points, strict=True))
    weights = [[dict(update) for update in program.updates] for program in (one, other)]
    return near and all(
        math.isclose(u.get(k, 0.0), v.get(k, 0.0), rel_tol=1e-6, abs_tol=1e-7)
        for u, v in zip(*weights, strict=True)
        for k in u.keys() | v.keys()
    )


# In words
