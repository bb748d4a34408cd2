"""Measure the pictures of a training run, by each scheduler at each budget, against the data of the run.

The error of `compare` tells how well a scheduler solves the equation. These metrics tell what that is worth, also for
schedulers that draw noise and have no error. Metrics, floors and ceilings are those of `diffgen evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from diffgen.devices import out_of_memory
from diffgen.errors import InputError
from diffgen.images.publish import publish
from diffgen.training.evaluate_plan import make_evaluation_plan
from diffgen.training.evaluation import data_of, in_proportion
from diffgen.training.metrics import METRICS
from diffgen.training.real_pictures import RealPictures

from .plan import Entry
from .results import DistributionResult, DistributionRow, Scale
from .run import FAILURES, Comparison, key_of, versions
from .subjects import RunSubject

SCHEMA = "diffgen.distribution/2"
BATCH = 128


class Distribution:
    """The data, and the pictures of every scheduler at every budget measured against them."""

    def __init__(self, comparison: Comparison, data: str, samples: int) -> None:
        """Raises InputError for data that do not fit the run."""
        subject = comparison.subject
        assert isinstance(subject, RunSubject)
        self.comparison, self.subject, self.samples = comparison, subject, samples
        plan = make_evaluation_plan(subject.generator.run.folder, samples=samples)
        try:
            self.data = data_of(plan, data)
        except InputError as error:
            raise InputError(error.message, "use the data that the run was trained on") from error
        self.real = RealPictures(self.data, plan.run.config.get("data", {}).get("held_out", 0.1))
        self.labels: Tensor | None = None
        if subject.data["classes"]:
            assert self.data.labels is not None
            share = self.data.labels[self.real.train_index].bincount(minlength=len(subject.data["classes"]))
            self.labels = in_proportion(share, samples)

    def settings(self) -> Iterator[tuple[Entry, int, int, int, float]]:
        """Every (entry, budget, steps, nfe, guidance) that can be made, each once."""
        settings = (
            (cell.entry, cell.budget, cell.steps, cell.nfe, cell.guidance)
            for cell in self.comparison.cells
            if cell.steps is not None and cell.nfe is not None
        )
        yield from dict.fromkeys(settings)

    def result(self, progress: Callable[[int, int], None] | None = None) -> DistributionResult:
        """Measure every setting; one that fails has a reason and no values. `progress(done, total)` counts NFE."""
        settings = list(self.settings())
        rows: list[DistributionRow] = []
        scales: dict[str, Scale] = {}
        total, done = sum(nfe for *_, nfe, _ in settings), 0
        for entry, budget, steps, nfe, guidance in settings:
            values, reason = None, None
            try:
                measured = self._measured(entry, steps, guidance)
            except FAILURES as error:
                reason = self.comparison.failed(error)
            else:
                values = {name: figures["value"] for name, figures in measured.items()}
                scales = {name: Scale(f["floor"], f["ceiling"], f["deviation"]) for name, f in measured.items()}
            rows.append(
                DistributionRow(
                    scheduler=entry.scheduler,
                    label=entry.label,
                    grid=entry.grid_name,
                    stochastic=entry.stochastic,
                    budget=budget,
                    nfe=nfe,
                    guidance=guidance,
                    values=values,
                    reason=reason,
                )
            )
            done += nfe
            if progress is not None:
                progress(done, total)
        return DistributionResult(
            data=self.data.name,
            samples=self.samples,
            held_out=len(self.real.test),
            better={name: metric.better for name, metric in METRICS.items() if name in scales},
            scales=scales,
            rows=tuple(rows),
        )

    def _measured(self, entry: Entry, steps: int, guidance: float) -> dict[str, dict[str, Any]]:
        """The metrics {name: {value, floor, deviation, ceiling}}, from the folder if they are there.

        `deviation` is that of the floor, None where there is none.
        """
        content = {
            "model": self.subject.model_hash,
            "data": self.data.fingerprint,
            "samples": self.samples,
            "guidance": guidance,
            "versions": versions(),
            **self.comparison.solver_content(entry, steps),
        }
        key = key_of(content)
        folder = self.comparison.folder.path / "distributions"
        stored = self.comparison.folder.read(folder / f"{key}.json", SCHEMA)
        if stored is not None:
            return stored["metrics"]
        evaluated = self.real.measure(self._pictures(entry, steps, guidance), self.labels)
        measured = {
            name: {**asdict(figures), "deviation": evaluated.floor_deviation.get(name)}
            for name, figures in evaluated.metrics.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"schema": SCHEMA, "metrics": measured}, indent=1, allow_nan=False)
        publish(folder / f"{key}.json", text.encode(), overwrite=True)
        return measured

    @torch.inference_mode()
    def _pictures(self, entry: Entry, steps: int, guidance: float) -> Tensor:
        """Pictures as uint8 values [N, C, H, W]; picture i starts from the noise of seed i."""
        scheduler, pictures = self.comparison.scheduler(entry), []
        grid = scheduler.grid(steps)
        for first in range(0, self.samples, BATCH):
            seeds = range(first, min(first + BATCH, self.samples))
            starts = [self.subject.start(seed) for seed in seeds]
            labels = None if self.labels is None else self.labels[seeds.start : seeds.stop].tolist()
            network = self.subject.generator.denoiser(labels, guidance)
            x = scheduler.start(torch.cat([noise for noise, _ in starts]).to(self.subject.device), grid)
            with out_of_memory():
                x0 = scheduler.sample(network, x, grid, [generator for _, generator in starts])
            pictures.append(self.data.to_values(x0).cpu())
        return torch.cat(pictures)
