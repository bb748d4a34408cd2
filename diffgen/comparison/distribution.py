"""How near the pictures of a run, made by each scheduler at each budget, come to the data that the run was trained on.

The error of `compare` says how true a scheduler is to the equation; this says what that is worth, also for schedulers
that draw noise, which have no error. Metrics, floors and ceilings are those of `diffgen evaluate`.
"""

from __future__ import annotations

import hashlib
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
from .run import FAILURES, Comparison, versions
from .subjects import RunSubject

SCHEMA = "diffgen.distribution/2"
BATCH = 128


class Distribution:
    """The data, and every scheduler at every budget measured against it. Raises InputError for data that do not fit."""

    def __init__(self, comparison: Comparison, data: str, samples: int) -> None:
        subject = comparison.subject
        assert isinstance(subject, RunSubject)
        self.comparison, self.subject, self.samples = comparison, subject, samples
        plan = make_evaluation_plan(subject.generator.run.folder, samples=samples)
        try:
            self.data = data_of(plan, data)
        except InputError as error:
            raise InputError(error.message, "give the data that it was trained on") from error
        self.real = RealPictures(self.data, plan.run.config.get("data", {}).get("held_out", 0.1))
        self.labels: Tensor | None = None
        if subject.data["classes"]:
            assert self.data.labels is not None
            share = self.data.labels[self.real.train_index].bincount(minlength=len(subject.data["classes"]))
            self.labels = in_proportion(share, samples)

    def settings(self) -> Iterator[tuple[Entry, int, int, int, float]]:
        """(entry, budget, steps, nfe, guidance) of all that can be made, each once."""
        seen = set()
        for cell in self.comparison.cells:
            if cell.steps is not None and cell.nfe is not None:
                setting = (cell.entry, cell.budget, cell.steps, cell.nfe, cell.guidance)
                if setting not in seen:
                    seen.add(setting)
                    yield setting

    def result(self, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """What results.json has as `distribution`: a row for each setting; one that failed has its reason."""
        settings, rows, scales = list(self.settings()), [], {}
        total = sum(nfe for *_, nfe, _ in settings)
        done = 0
        for entry, budget, steps, nfe, guidance in settings:
            row: dict[str, Any] = {
                "scheduler": entry.scheduler,
                "label": entry.label,
                "grid": entry.grid_name,
                "stochastic": entry.stochastic,
                "budget": budget,
                "nfe": nfe,
                "guidance": guidance,
                "values": None,
                "reason": None,
            }
            try:
                found = self._measured(entry, steps, guidance)
            except FAILURES as error:
                row["reason"] = self.comparison.failed(error)
            else:
                row["values"] = {name: figures["value"] for name, figures in found.items()}
                scales = {n: {k: f[k] for k in ("floor", "deviation", "ceiling")} for n, f in found.items()}
            rows.append(row)
            done += nfe
            if progress is not None:
                progress(done, total)
        return {
            "data": self.data.name,
            "samples": self.samples,
            "held_out": len(self.real.test),
            "better": {name: metric.better for name, metric in METRICS.items() if name in scales},
            "scales": scales,
            "rows": rows,
        }

    def _measured(self, entry: Entry, steps: int, guidance: float) -> dict[str, dict[str, float | None]]:
        """{name: {value, floor, deviation, ceiling}}, from the folder if it was found before; the deviation is the
        floor's, None where there is none."""
        content = {
            "model": self.subject.model_hash,
            "data": self.data.fingerprint,
            "samples": self.samples,
            "guidance": guidance,
            "versions": versions(),
            **self.comparison.walked(entry, steps),
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=float).encode()).hexdigest()[:32]
        folder = self.comparison.folder.path / "distributions"
        known = self.comparison.folder.read(folder / f"{key}.json", SCHEMA)
        if known is not None:
            return known["metrics"]
        measured = self.real.measure(self._pictures(entry, steps, guidance), self.labels)
        plain: dict[str, dict[str, float | None]] = {
            name: {**asdict(figures), "deviation": measured.floor_deviation.get(name)}
            for name, figures in measured.metrics.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"schema": SCHEMA, "metrics": plain}, indent=1, allow_nan=False)
        publish(folder / f"{key}.json", text.encode(), overwrite=True)
        return plain

    @torch.inference_mode()
    def _pictures(self, entry: Entry, steps: int, guidance: float) -> Tensor:
        """Values uint8 [N, C, H, W]; picture i from the noise of seed i, the same for every scheduler."""
        scheduler, made = self.comparison.scheduler(entry), []
        grid = scheduler.grid(steps)
        for first in range(0, self.samples, BATCH):
            seeds = range(first, min(first + BATCH, self.samples))
            starts = [self.subject.start(seed) for seed in seeds]
            labels = None if self.labels is None else self.labels[seeds.start : seeds.stop].tolist()
            network = self.subject.generator.denoiser(labels, guidance)
            x = scheduler.start(torch.cat([noise for noise, _ in starts]).to(self.subject.device), grid)
            with out_of_memory():
                x0 = scheduler.sample(network, x, grid, [generator for _, generator in starts])
            made.append(self.data.to_values(x0).cpu())
        return torch.cat(made)
