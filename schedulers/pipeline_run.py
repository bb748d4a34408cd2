"""One run of a solver inside a pipeline of diffusers, which owns the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulers.draws import Generators, normal
from schedulers.grid import Grid
from schedulers.noise import Point
from schedulers.prediction import Denoised, Pair
from schedulers.program import Key, Program
from schedulers.solver import Steps, matching_rest


class PipelineRun:
    """The state between two calls of `Scheduler.step`: kept in float32, and replaced where the pipeline edits it.

    `program` is the run as a table, or None; then `solve(x, noise)` runs as a generator. `span` is (first evaluation,
    number of evaluations of the whole grid).
    """

    def __init__(
        self,
        program: Program | None,
        solve: Callable[[Any, Any], Steps],
        sample: Tensor,
        pair: Pair,
        limit: Callable[[Tensor], Tensor] | None,
        span: tuple[int, int],
    ) -> None:
        self.program, self.pair, self.limit = program, pair, limit
        self.begin, self.total = span
        self.done = self.begin
        self.state: Any = None
        self.shape: Any = None
        self.values: dict[Key, Tensor] = {}
        if program is None:
            self.steps = solve(sample.float(), self._noise)
            self.state, self.point = next(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy, without what the next step gets anew. Raises TypeError for a run that has no program."""
        if self.program is None:
            raise TypeError("a scheduler with this solver cannot be copied in the middle of a run: copy it before")
        return self.__dict__ | {"pair": None, "generator": None}

    def _noise(self, p: Point, q: Point) -> Any:
        """Draw noise; 0 before the first evaluation, because the pipeline makes that state."""
        return 0.0 if self.shape is None else normal(self.shape, self.generator, self.device)

    def step(
        self, output: Tensor, sample: Tensor, generator: Generators, without: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the state of the next evaluation in the dtype of `sample`, x0), both [B, …].

        `without` is the output without the prompt, for solvers that need it.
        """
        i = self.done - self.begin
        if self.done >= self.total:
            raise RuntimeError(f"step was called more often than the grid has evaluations ({self.total})")
        x, output, without = sample.float(), output.float(), None if without is None else without.float()
        if i > 0 and sample.dtype is not torch.float32:  # use the unrounded state wherever the pipeline did not edit it
            x = torch.where(sample == self.state.to(sample.dtype), self.state, x)
        self.done += 1
        self.shape, self.device, self.generator = sample.shape, sample.device, generator
        if self.program is not None:
            d = Denoised(x, output, self.program.points[i], self.pair, self.limit, without)
            y, u = (e.predicted if self.limit is None else e.x0 for e in (d, d.unconditional))
            self.state = self.program.advance(i, self.values, x, y, u, self._noise)
        else:
            d = Denoised(x, output, self.point, self.pair, self.limit, without)
            try:
                self.state, self.point = self.steps.send(d)
            except StopIteration as stop:
                self.state = stop.value
        return self.state.to(sample.dtype), d.x0


def solve_from(
    solve: Callable[..., Steps], grid: Grid, evaluations: Sequence[Point], begin: int, x: Any, noise: Any
) -> Steps:
    """The solver from evaluation number `begin` on: restarted on the rest of the grid, where a step begins.

    First-order steps lead to that beginning. They also lead to the end, if no restart has the same `evaluations`, which
    the pipeline already has.
    """
    if begin == 0:
        return (yield from solve(x, grid, noise))
    for i in range(begin, len(evaluations)):
        rest = matching_rest(solve, grid, evaluations[i:])
        if rest is not None:
            return (yield from solve(x, rest, noise))
        d = yield x, evaluations[i]
        q = evaluations[i + 1] if i + 1 < len(evaluations) else grid[-1]
        x = q.alpha * d.x0 + q.sigma * d.unconditional.eps
    return x
