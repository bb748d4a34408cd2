"""What tuning did, as one picture: results before and after beside the teacher's, the levels, the search."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from schedulers.noise import level_symbol

from .plan import SEEDS_BELOW, Entry
from .subjects import Subject
from .tune import as_json, solve_as

SHOWN = 6  # starts, of the noises that nothing was learned from


@torch.no_grad()
def picture(subject: Subject, found: dict[str, Any], prompt_of: Callable[[int], str]) -> bytes:
    """A PNG: one column for each start, and below them the grids and the curve of the search."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    count = 1 if subject.is_mixture else SHOWN
    seeds = [SEEDS_BELOW - 1 - i for i in range(count)]
    before = Entry(found["solver"], found["solver"], found["built_in"]["grid"])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.json"
        path.write_text(as_json(found))
        after = Entry(found["solver"], found["solver"], str(path))
        rows = [
            (f"{before.grid}", [solve_as(subject, before, found, seed, prompt_of(seed)) for seed in seeds]),
            ("tuned", [solve_as(subject, after, found, seed, prompt_of(seed)) for seed in seeds]),
            ("solution", [solve_as(subject, None, found, seed, prompt_of(seed)) for seed in seeds]),
        ]
        scheduler = before.build(subject)
        grids = {
            before.grid: scheduler.grid(scheduler.steps_for(found["nfe"])).points[:-1],
            "tuned": after.build(subject).grid().points[:-1],
        }
    # the mixture's one cloud: before, after and solution side by side
    tall = [[row[1][0] for row in rows]] if count == 1 else [row[1] for row in rows]
    names = [[row[0] for row in rows]] if count == 1 else [[row[0], *[""] * (count - 1)] for row in rows]
    height = 3.3 if count == 1 else 4.6
    figure = Figure(figsize=(9, height + 3.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, 3.2])
    above, below = parts
    above.suptitle(
        f"{subject.name}: {found['solver']}, {found['nfe']} evaluations, guidance {found['guidance']:g} "
        f"(noises that nothing was learned from)"
    )
    axes = above.subplots(len(tall), len(tall[0]), squeeze=False)
    for pictures, titles, line in zip(tall, names, axes, strict=True):
        for image, title, place in zip(pictures, titles, line, strict=True):
            place.imshow(image, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(title, loc="left", fontsize=10)
    left, right = below.subplots(1, 2)
    for name, points in grids.items():
        levels = [float(p.sigma if p.alpha == 0 else subject.noise.level(p)) for p in points]
        left.plot(range(1, len(levels) + 1), levels, marker="o", label=name)
    left.set_xticks(range(1, found["nfe"] + 1))
    left.set(yscale="log", xlabel="evaluation", ylabel=level_symbol(subject.noise.name))
    left.legend()
    right.plot(*zip(*((v["iteration"], v["error"]) for v in found["validation"]), strict=True), label="tuned")
    right.axhline(found["built_in"]["error"], color="gray", linestyle="--", label=f"best built-in: {before.grid}")
    right.set(xlabel="iteration", ylabel="error on held-out noises", ylim=(0, None))
    right.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
