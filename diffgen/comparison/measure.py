"""From finished cells to results: errors, means with intervals, ranks, measured orders, equal pictures."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import schedulers
from diffgen.devices import out_of_memory
from diffgen.images.metadata import encode_png
from schedulers.program import Program

from . import metrics
from .metrics import CLOUD, PICTURE, RESULT, Interval, interval
from .plan import Cell, Entry
from .ranks import BELOW, ranked
from .results import (
    AxesInfo,
    CellResult,
    DistributionResult,
    DuplicateResult,
    EntryInfo,
    GridResult,
    OrderResult,
    ReferenceResult,
    Results,
    RowResult,
    StartResult,
    SubjectInfo,
)
from .run import Comparison, Folder, Task, image_name, versions
from .subjects import MixtureSubject
from .verdict import verdict


def measure(
    comparison: Comparison,
    command: str,
    seconds: float | None = None,
    distribution: DistributionResult | None = None,
) -> Results:
    """The results of the cells that are finished; the others are marked as failed or missing."""
    starts = tuple(s for start in comparison.axes.starts() if (s := _start(comparison, *start)) is not None)
    errors = [start.error for start in starts if start.error is not None]
    floor = max(errors, default=0.0)  # the error of the reference itself
    cells = tuple(_cells(comparison, starts))
    rows = ranked(_rows(comparison, cells, {start.key for start in starts}), floor)
    reference = comparison.reference
    results = Results(
        command=command,
        seconds=seconds,
        model=_subject_info(comparison),
        axes=_axes_info(comparison),
        reference=ReferenceResult(
            kind="none" if reference is None else "exact" if reference.entry is None else "numerical",
            name=None if reference is None else reference.name,
            error=floor if errors else None,
            reason=comparison.reference_failure,
            starts=starts,
        ),
        cells=cells,
        rows=rows,
        orders=tuple(_orders(rows, floor)),
        grids=tuple(_grids(comparison)),
        duplicates=tuple(_duplicates(comparison, cells)),
        distribution=distribution,
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        folder=comparison.folder.path,
        codes=frozenset(comparison.codes),
    )
    notes = (f"{note[0].upper()}{note[1:]}." for note in comparison.notes())
    return replace(results, verdict=(*verdict(results), *notes))


def seconds_to_finish(comparison: Comparison, tasks: Sequence[Task]) -> float:
    """About how long the tasks take besides evaluating the network: one result is drawn, written and measured."""
    if not tasks:
        return 0.0
    subject, first = comparison.subject, tasks[0]
    noise, _ = subject.start(first.seed)
    with torch.inference_mode(), out_of_memory(), tempfile.TemporaryDirectory() as scratch:
        subject.picture(noise)  # the first one is slower
        began = time.perf_counter()
        image = subject.picture(noise)
        record, png = {"image": image_name(first.key)}, encode_png(image, {}, "none")
        Folder(Path(scratch), comparison.folder.shape).store(first.key, record, noise.float().cpu(), png)
        if isinstance(subject, MixtureSubject):
            for metric in CLOUD.values():
                metric(noise, subject, first.seed)
        else:
            for picture_metric in PICTURE.values():
                picture_metric(image, image)
        each, exact = time.perf_counter() - began, sum(task.entry is None for task in tasks)
        began = time.perf_counter()
        if exact:
            subject.exact(noise)
    return each * len(tasks) + (time.perf_counter() - began) * exact


def _subject_info(comparison: Comparison) -> SubjectInfo:
    subject = comparison.subject
    return SubjectInfo(
        name=subject.name,
        family=subject.family,
        hash=subject.model_hash,
        noise=subject.noise.name,
        prediction=subject.prediction,
        device=subject.device.type,
        dtype=str(subject.dtype).removeprefix("torch."),
    )


def _axes_info(comparison: Comparison) -> AxesInfo:
    axes = comparison.axes
    entries = []
    for entry in axes.entries:
        solver = schedulers.info(entry.scheduler)
        entries.append(
            EntryInfo(
                label=entry.label,
                scheduler=entry.scheduler,
                grid=entry.grid_name,
                stochastic=entry.stochastic,
                order=solver.order,
                evaluations_per_step=solver.evaluations_per_step,
            )
        )
    return AxesInfo(tuple(entries), axes.budgets, axes.seeds, axes.prompts, axes.guidance)


def _start(comparison: Comparison, seed: int, prompt: str, guidance: float) -> StartResult | None:
    """The reference of a start. Its own error is its distance to that of half the evaluations, over 2^order − 1."""
    tasks = comparison.reference_tasks(seed, prompt, guidance)
    records = [comparison.folder.record(task.key) for task in tasks]
    if not tasks or records[0] is None:
        return None
    error = 0.0 if len(tasks) == 1 else None
    if len(tasks) == 2 and records[1] is not None:
        entry = tasks[0].entry
        assert entry is not None
        full, half = (comparison.folder.result(task.key).numpy() for task in tasks)
        order = min(schedulers.info(entry.scheduler).order, 2)  # guided networks reach no more
        error = metrics.rms(full, half) / (2**order - 1)
    return StartResult(
        seed=seed,
        prompt=prompt,
        guidance=guidance,
        key=tasks[0].key,
        error=error,
        nfe=records[0]["nfe"],
        image=image_name(tasks[0].key),
        metrics=_cloud_metrics(comparison, tasks[0].key, seed),  # as near as so small a cloud can come
    )


def _cloud_metrics(comparison: Comparison, key: str, seed: int) -> dict[str, float | None]:
    """The metrics of a cloud of points; empty where results are pictures."""
    subject = comparison.subject
    if not isinstance(subject, MixtureSubject):
        return {}
    x0 = comparison.folder.result(key)
    return {name: metric(x0, subject, seed) for name, metric in CLOUD.items()}


def _cells(comparison: Comparison, starts: Sequence[StartResult]) -> Iterator[CellResult]:
    """Every cell with its metrics. A stochastic solver has no error: it aims at no single solution."""
    by_start = {(s.seed, s.prompt, s.guidance): s for s in starts}

    @lru_cache(maxsize=1)  # the cells of a start follow each other
    def solution(key: str) -> tuple[np.ndarray, Callable[[], Image.Image]]:
        return comparison.folder.result(key).numpy(), lru_cache(lambda: comparison.folder.picture(key))

    for i, cell in enumerate(comparison.cells):
        result = _cell(comparison, i, cell)
        if result.status != "done" or result.key is None:
            yield result
            continue
        measured = {**result.metrics, **_cloud_metrics(comparison, result.key, cell.seed)}
        start = by_start.get((cell.seed, cell.prompt, cell.guidance))
        if start is not None and not result.stochastic:
            aim, aim_picture = solution(start.key)
            x0 = comparison.folder.result(result.key).numpy()
            measured |= {name: metric(x0, aim) for name, metric in RESULT.items()}
            if not comparison.subject.is_mixture:
                picture = comparison.folder.picture(result.key)
                measured |= {name: metric(picture, aim_picture()) for name, metric in PICTURE.items()}
        yield replace(result, metrics=measured)


def _cell(comparison: Comparison, i: int, cell: Cell) -> CellResult:
    """Cell number i without its metrics."""
    key = comparison.key(cell)
    reason = comparison.failures.get(i)
    record = comparison.folder.record(key) if key and reason is None else None
    seconds, nfe = (None, cell.nfe) if record is None else (record["seconds"], record["nfe"])
    stored = record or {}
    return CellResult(
        scheduler=cell.entry.scheduler,
        label=cell.entry.label,
        grid=cell.entry.grid_name,
        budget=cell.budget,
        nfe=nfe,
        steps=cell.steps,
        seed=cell.seed,
        prompt=cell.prompt,
        guidance=cell.guidance,
        stochastic=cell.entry.stochastic,
        status="done" if record is not None else "failed" if reason is not None else "missing",
        seconds=seconds,
        seconds_per_nfe=seconds / nfe if seconds is not None and nfe else None,
        network_calls=stored.get("network_calls"),
        peak_memory=stored.get("peak_memory"),
        metrics=dict.fromkeys((*RESULT, *PICTURE)),
        image=None if record is None or key is None else image_name(key),
        pixels_sha256=stored.get("pixels_sha256"),
        noise_sha256=stored.get("noise_sha256"),
        reason=reason,
        key=key,
    )


def _rows(comparison: Comparison, cells: Sequence[CellResult], references: set[str]) -> list[RowResult]:
    """Each scheduler at each budget, without ranks. `references` are the keys of the reference solutions."""
    groups: dict[Any, list[CellResult]] = defaultdict(list)
    for cell in cells:
        groups[cell.place].append(cell)
    names = [*RESULT, *PICTURE, *(CLOUD if comparison.subject.is_mixture else ())]
    rows = []
    for members in groups.values():
        first, done = members[0], [m for m in members if m.status == "done"]
        rows.append(
            RowResult(
                scheduler=first.scheduler,
                label=first.label,
                grid=first.grid,
                stochastic=first.stochastic,
                budget=first.budget,
                prompt=first.prompt,
                guidance=first.guidance,
                nfe=first.nfe,
                steps=first.steps,
                done=len(done),
                failed=sum(m.status == "failed" for m in members),
                missing=sum(m.status == "missing" for m in members),
                is_reference=any(m.key in references for m in members),
                seconds=_mean(m.seconds for m in done),
                seconds_per_nfe=_mean(m.seconds_per_nfe for m in done),
                metrics={name: _mean(m.metrics.get(name) for m in done) for name in names},
            )
        )
    return rows


def _mean(values: Iterator[float | None]) -> Interval | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return interval(finite) if finite else None


def _orders(rows: Sequence[RowResult], floor: float) -> Iterator[OrderResult]:
    """The measured order of each solver, over the budgets at which the reference can resolve its error."""
    groups: dict[tuple[str, str, str, float], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row.error is not None and row.nfe is not None and row.error.mean > max(BELOW * floor, 1e-12):
            groups[row.label, row.grid, row.prompt, row.guidance].append((row.nfe, row.error.mean))
    for (label, grid, prompt, guidance), points in groups.items():
        nfe = [n for n, _ in points]
        order = metrics.order(nfe, [error for _, error in points]) if len(set(nfe)) >= 3 else None
        yield OrderResult(label, grid, prompt, guidance, order, min(nfe), max(nfe))


def _grids(comparison: Comparison) -> list[GridResult]:
    """The points of each scheduler for the largest budget that it can use."""
    noise = comparison.subject.noise
    grids: dict[Entry, GridResult] = {}
    for cell in comparison.cells:
        if cell.steps is not None:
            points = comparison.scheduler(cell.entry).grid(cell.steps).points[:-1]
            grids[cell.entry] = GridResult(
                label=cell.entry.label,
                grid=cell.entry.grid_name,
                budget=cell.budget,
                times=tuple(float(p.t) for p in points),
                sigmas=tuple(float(p.sigma if p.alpha == 0 else noise.level(p)) for p in points),
            )
    return list(grids.values())


def _duplicates(comparison: Comparison, cells: Sequence[CellResult]) -> Iterator[DuplicateResult]:
    """Different cells of one start with the same pixels, and whether equal arithmetic explains it."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        if cell.status == "done":
            groups[cell.pixels_sha256, cell.seed, cell.prompt, cell.guidance].append(i)
    pairs: dict[tuple[Entry, Entry, int, int], list[tuple[int, int]]] = defaultdict(list)
    for members in groups.values():
        for i, j in itertools.combinations(members, 2):
            a, b = comparison.cells[i], comparison.cells[j]
            pairs[a.entry, b.entry, a.budget, b.budget].append((i, j))
    for equal in pairs.values():
        a, b = (comparison.cells[i] for i in equal[0])
        same = _same_arithmetic(comparison, a, b)
        why = "the same steps with the same coefficients" if same else "different arithmetic: worth a look"
        yield DuplicateResult(tuple(equal), same, why)


def _same_arithmetic(comparison: Comparison, a: Cell, b: Cell) -> bool:
    """True if two cells evaluate the network at the same points and combine its outputs with the same weights."""
    if a.steps is None or b.steps is None:
        return False
    if comparison.key(a) == comparison.key(b):
        return True
    one, other = (_program(comparison, cell) for cell in (a, b))
    if one is None or other is None or len(one.points) != len(other.points):
        return False
    near = all(math.isclose(p.t, q.t, abs_tol=1e-9) for p, q in zip(one.points, other.points, strict=True))
    weights = [[dict(update) for update in program.updates] for program in (one, other)]
    return near and all(
        math.isclose(u.get(k, 0.0), v.get(k, 0.0), rel_tol=1e-6, abs_tol=1e-7)
        for u, v in zip(*weights, strict=True)
        for k in u.keys() | v.keys()
    )


def _program(comparison: Comparison, cell: Cell) -> Program | None:
    """The run of a cell's solver as a table of numbers; None if it has none."""
    scheduler = comparison.scheduler(cell.entry)
    return None if cell.steps is None else scheduler.program(scheduler.grid(cell.steps))
