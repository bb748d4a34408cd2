"""The plan of an evaluation: its options, checked before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from diffgen.generation.checks import MAX_PICTURES, check_int
from diffgen.models.find import Model

from .plan import RunPlan, Shot, make_plan
from .run import read_run

OPTIONS = ("samples", "seed", "steps", "guidance", "scheduler", "grid", "batch_size", "any_data", "bits", "ode")


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(RunPlan):
    """The samples to make of a run, and what to measure besides."""

    labels: tuple[int, ...] = ()  # the class of each sample, if there are classes
    own_data: bool = True  # whether the data must be those that the run was trained on
    bits: bool = True
    ode: bool = False

    def shots(self) -> Iterator[Shot]:
        if not self.labels:
            yield from super().shots()
        for i, label in enumerate(self.labels):
            yield Shot(plan=self, prompt=self.run.data["classes"][label], label=label, index=i, seed=self.seed + i)


def make_evaluation_plan(
    run: str | os.PathLike[str],
    *,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    any_data: bool = False,
    bits: bool = True,
    ode: bool = False,
    **sampling: Any,
) -> EvaluationPlan:
    """Check the options of `evaluate`; `sampling` are steps, guidance, scheduler and grid.

    Raises UsageError for an invalid option, InputError for an invalid run.
    """
    if samples is not None:
        check_int("--samples", samples, 2, MAX_PICTURES)
    if batch_size is not None:
        check_int("--batch-size", batch_size, 1, 4096)
    of = read_run(os.fspath(run))
    model = Model(of.name, of.folder, "run", bundled=False, source="folder")
    count = samples or (1000 if of.data.get("classes") else 500)
    plan = make_plan(model, count=count, seed=seed, **sampling)
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    values["batch_size"] = batch_size or plan.fitting
    return EvaluationPlan(**values, own_data=not any_data, bits=bits, ode=ode)
