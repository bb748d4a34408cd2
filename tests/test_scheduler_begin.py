"""A pipeline may begin at any evaluation of the grid, as image-to-image does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from pipeline_loop import INSIDE, MIXTURE, SD, loop, seeds, start

import schedulers
from schedulers import Scheduler
from schedulers.solver import Solver, matching_rest


def test_a_start_midway_keeps_the_history_of_any_solver() -> None:
    """A solver that does not walk over `grid.pairs()` keeps its history too."""

    def walker(steps: Any) -> Any:
        def mine(x: Any, grid: Any, noise: Any) -> Any:
            before = None
            for p, q in steps(grid):
                d = yield x, p
                x = q.alpha * d.x0 + q.sigma * d.eps
                x = x if before is None else x + (d.eps - before) * (0.5 * (q.sigma - q.alpha * p.rho))
                before = d.eps
            return x

        return Solver("mine", mine, 1, 1, False, "karras", (), "mine", "none")

    results = []
    for steps in (lambda g: g.pairs(), pairwise, lambda g: [(g[i], g[i + 1]) for i in range(len(g) - 1)]):
        s = Scheduler(walker(steps), SD, "epsilon", "karras", {})
        s.set_timesteps(9)
        s.set_begin_index(4)
        results.append(loop(s, MIXTURE.denoiser(SD), start(s), 4))
    expected = s.sample(MIXTURE.denoiser(SD), start(s), s.grid(9)[4:])
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_ddim_inverse_begins_only_at_the_picture() -> None:
    s = schedulers.get("ddim_inverse")
    s.set_timesteps(5)
    with pytest.raises(ValueError, match="begins at 0, not at 2"):
        s.set_begin_index(2)


@pytest.mark.parametrize("name", [name for name in INSIDE if not schedulers.info(name).upwards])
def test_a_run_may_begin_at_every_evaluation(name: str) -> None:
    s = schedulers.get(name)
    network = MIXTURE.denoiser(SD)
    s.set_timesteps(5)
    points = list(s._evaluations)
    clean = MIXTURE.draw(3, torch.Generator().manual_seed(1)).reshape(3, 2, 2, 2).float()
    for begin in range(len(points)):
        s.set_timesteps(5)
        s.set_begin_index(begin)
        x = s.add_noise(
            clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)), s.timesteps[begin].expand(3)
        )
        result = loop(s, network, x, begin, seeds(3))
        assert s._run is not None
        assert s._run.program is not None
        assert s._run.program.points == points[begin:]  # the times that the pipeline has
        assert result.isfinite().all()
        rest = matching_rest(s.solve, s.grid(5), points[begin:])
        if rest is not None and points[begin] == rest[0]:
            torch.testing.assert_close(result, s.sample(network, x, rest, seeds(3)), rtol=1e-3, atol=1e-4)


def test_a_run_may_begin_inside_a_step() -> None:
    """A start at the second evaluation of Heun's first step: first order to the next beginning, here the same point."""
    s = schedulers.get("heun", grid="trailing")
    network, grid = MIXTURE.denoiser(SD), s.grid(3)
    s.set_timesteps(3)
    assert s._evaluations == [grid[0], grid[1], grid[1], grid[2], grid[2]]
    s.set_begin_index(1)
    x = start(s)
    result = loop(s, network, x, 1)
    torch.testing.assert_close(result, s.sample(network, x, grid[1:]), rtol=1e-4, atol=1e-5)


def test_begin_index_out_of_range() -> None:
    s = schedulers.get("euler")
    s.set_timesteps(5)
    with pytest.raises(ValueError, match="the grid has 5 evaluations, it cannot begin at number 5"):
        s.set_begin_index(5)
