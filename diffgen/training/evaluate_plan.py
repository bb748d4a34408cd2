"""What an evaluation will do: checked before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields

from diffgen.generation.checks import MAX_PICTURES, check_int
from diffgen.models.find import Model

from .plan import RunPlan, Shot, make_plan
from .run import read_run

AT_ONCE = 2**16  # pixels of a batch, unless its size is given


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(RunPlan):
    """The pictures to make of a run, and what is found besides."""

    labels: tuple[int, ...] = ()  # the class of each picture, where there are classes
    own_data: bool = True  # only the data that the run was trained on will do
    bits: bool = True
    ode: bool = False

    def shots(self) -> Iterator[Shot]:
        if not self.labels:
            yield from super().shots()
        for i, label in enumerate(self.labels):
            yield Shot(prompt=self.run.data["classes"][label], label=label, index=i, seed=self.seed + i)


def make_evaluation_plan(
    run: str | os.PathLike[str],
    *,
    samples: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    grid: str | None = None,
    batch_size: int | None = None,
    any_data: bool = False,
    bits: bool = True,
    ode: bool = False,
) -> EvaluationPlan:
    """See `evaluate.evaluate`. Raises UsageError for a wrong number or name, InputError for a run that is wrong."""
    if samples is not None:
        check_int("--samples", samples, 2, MAX_PICTURES)
    if batch_size is not None:
        check_int("--batch-size", batch_size, 1, 4096)
    said = read_run(os.fspath(run))
    plan = make_plan(
        Model(said.name, said.folder, "run", bundled=False, source="folder"),
        count=samples or (1000 if said.data.get("classes") else 500),
        seed=seed,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        grid=grid,
    )
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    values["batch_size"] = batch_size or max(1, min(256, AT_ONCE // (plan.width * plan.height)))
    return EvaluationPlan(**values, own_data=not any_data, bits=bits, ode=ode)
