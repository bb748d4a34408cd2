"""Draw a tuned grid: results before and after beside the teacher's, the noise levels, the course of the search."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from schedulers.noise import level_symbol

from .plan import SEEDS_BELOW, Entry
from .search import TunedGrid, as_json, solve
from .subjects import Subject

SHOWN = 6  # starts, with held-out noises


@torch.no_grad()
def draw(subject: Subject, grid: TunedGrid, prompt_of: Callable[[int], str]) -> bytes:
    """A PNG: a column for each start, and below them the grids and the course of the search."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    count = 1 if subject.is_mixture else SHOWN
    seeds = [SEEDS_BELOW - 1 - i for i in range(count)]
    before = Entry(grid.solver, grid.solver, grid.built_in.grid)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.json"
        path.write_text(as_json(grid))
        after = Entry(grid.solver, grid.solver, str(path))
        rows = [
            (name, [solve(subject, entry, grid, seed, prompt_of(seed)) for seed in seeds])
            for name, entry in ((before.grid, before), ("tuned", after), ("solution", None))
        ]
        scheduler = before.build(subject)
        points_of = {
            before.grid: scheduler.grid(scheduler.steps_for(grid.nfe)).points[:-1],
            "tuned": after.build(subject).grid().points[:-1],
        }
    # of the mixture there is one start: before, after and solution stand side by side
    tall = [[row[1][0] for row in rows]] if count == 1 else [row[1] for row in rows]
    names = [[row[0] for row in rows]] if count == 1 else [[row[0], *[""] * (count - 1)] for row in rows]
    height = 3.3 if count == 1 else 4.6
    figure = Figure(figsize=(9, height + 3.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, 3.2])
    above, below = parts
    above.suptitle(
        f"{subject.name}: {grid.solver}, {grid.nfe} evaluations, guidance {grid.guidance:g} (held-out noises)"
    )
    axes = above.subplots(len(tall), len(tall[0]), squeeze=False)
    for pictures, titles, line in zip(tall, names, axes, strict=True):
        for image, title, place in zip(pictures, titles, line, strict=True):
            place.imshow(image, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(title, loc="left", fontsize=10)
    left, right = below.subplots(1, 2)
    for name, points in points_of.items():
        levels = [float(p.sigma if p.alpha == 0 else subject.noise.level(p)) for p in points]
        left.plot(range(1, len(levels) + 1), levels, marker="o", label=name)
    left.set_xticks(range(1, grid.nfe + 1))
    left.set(yscale="log", xlabel="evaluation", ylabel=level_symbol(subject.noise.name))
    left.legend()
    right.plot(*zip(*((check.iteration, check.error) for check in grid.validation), strict=True), label="tuned")
    right.axhline(grid.built_in.error, color="gray", linestyle="--", label=f"best built-in: {before.grid}")
    right.set(xlabel="iteration", ylabel="error on held-out noises", ylim=(0, None))
    right.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
